"""What is compared: one row for each work. A limit is the ratio that ckptkit must keep to that rival."""

from __future__ import annotations

from tests.benchmarks.descriptions import Rival, Row, ckpt, code, peer, script, shell, timed

__all__ = ["AGAIN", "LARGE", "RENAMED", "ROWS", "A", "flushed_copy", "moved", "parsed", "sft"]

START = "Start"
NAMES = "Names and shapes"
COPIES = "Copies"
VALUES = "Values"
LOADING = "Loading and training"
MERGES = "Merges"
DELTAS = "Deltas"

NO_FLUSH = "does not flush to the disk"
NO_RULE = "names no rule that would match the keys; exit code 0"
NO_VALUE = "looks at no value"
ONE_HASH = "hashes the file as one, names and format too"
NO_LOSSES = "does not count what the cast loses"
FIRST_50 = "prints the first 50 tensors"
FEWER_SUMS = "no histogram and no L1 norm"
FIVE_SUMS = "mean, deviation, extremes and norm only"
ONLY_FINITE = "finds NaN and Inf only"
ACCEPTS = "does not look into bfloat16; accepts tensors that overlap, and bytes that belong to none"
ONLY_NAMES = "names of changed tensors only"

A, RENAMED, AGAIN = "a.safetensors", "renamed.safetensors", "again.safetensors"
SMALL, LARGE, TUNED = "small.safetensors", "large.safetensors", "tuned.safetensors"
BASE, MATH, CODE = "base.safetensors", "math.safetensors", "code.safetensors"
WEIGHTS = "--weight math=0.6 --weight code=0.4"
HALF, OTHER_HALF = "load420.safetensors", "other420.safetensors"

IMPORT_CLICK = Rival("import click", code("import click"), 1.3, "only starts Python and imports this library")


def flushed_copy(name: str, limit: float = 1.1) -> Rival:
    """Return the copy of a file in the way of ckptkit: beside the target, flushed, renamed, the directory flushed."""
    line = f"cp {name} out.tmp && sync out.tmp && mv out.tmp out-cp && sync ."
    return Rival("cp, flushed", shell(line), limit, "copies bytes, and looks at none")


def parsed(limit: float, *names: str) -> Rival:
    """Return the least work on headers."""
    return Rival("json.loads of the headers", script(f"parse {' '.join(names)}"), limit, "parses, and compares nothing")


def moved(share: float, *names: str, limit: float | None = None) -> Rival:
    """Return the least work that reads all these files and writes a share of the bytes of the first."""
    words = {0.5: "reading it, writing half"}.get(share, f"reading {len(names)}, writing one")
    return Rival(
        words, script(f"move {share:g} out-moved {' '.join(names)}"), limit, "moves as many bytes, and looks at none"
    )


def sft(line: str, limit: float | None = None, differs: str = "") -> Rival:
    """Return a command of sft-cli."""
    return Rival(f"sft {line.split(maxsplit=1)[0]}", peer("sft-cli", f"sft {line}"), limit, differs)


def _other(line: str, differs: str = "") -> Rival:
    return Rival(f"other ckptkit: {line.split(maxsplit=1)[0]}", peer("ckptkit", f"ckptkit {line}"), None, differs)


def _torch(name: str, line: str, limit: float | None = None, differs: str = "") -> Rival:
    return Rival(name, script(line), limit, differs)


def _mergekit(method: str, limit: float | None = None) -> Rival:
    return Rival(f"mergekit {method}", peer("mergekit", f"mergekit-pytorch {method}.yml out-mergekit"), limit, NO_FLUSH)


def _merge(method: str, limit: float, options: str, *names: str) -> Row:
    """Return the row of a merge of values: limits to the least work, and to mergekit."""
    return Row(
        MERGES,
        method,
        (*names, f"{method}.yml"),
        ckpt(f"merge {' '.join(names)} -o out.safetensors --method {method} {options}"),
        (moved(1, *names, limit=limit), _mergekit(method, 0.2)),
        megabytes=200,
    )


def _memcmp(first: str, second: str, limit: float) -> Rival:
    return Rival("reading and memcmp", script(f"memcmp {first} {second}"), limit, "the least work: no arithmetic")


def _tensortracker(first: str, second: str) -> Rival:
    command = peer("tensortracker", f"script tensortracker_diff {first} {second}")
    return Rival("tensortracker", command, None, ONLY_NAMES)


def _delta(what: str, base: str, name: str) -> Row:
    """Return the row that writes a patch: its time, and its bytes."""
    return Row(
        DELTAS,
        f"delta, {what}",
        (base, name),
        ckpt(f"delta {base} {name} -o out.safetensors"),
        (
            Rival(
                "XOR in planes, zlib",
                script(f"xor_planes {base} {name} out-xor"),
                None,
                "no digests, no second look, and no names; one thread",
                0.95,
            ),
            Rival(
                "reminis diff",
                peer("reminis", f"script reminis_delta {base} {name} out-reminis"),
                1.5,
                "converts both files to its databases before",
                0.95,
            ),
        ),
        megabytes=130,
    )


def _apply(what: str, base: str, patch: str, new: str) -> Row:
    return Row(
        DELTAS,
        f"apply, {what}",
        (base, new, patch),
        ckpt(f"apply {base} {patch} -o out.safetensors"),
        (flushed_copy(new, 40.0),),
        megabytes=100,
    )


def _load(what: str, name: str, model: str, function: str = "load") -> Row:
    ours, theirs = (timed(f"{function} {who} {name} {model}") for who in ("ckptkit", "torch"))
    loader = "load_file" if name.endswith(".safetensors") else "torch.load"
    rival = Rival(f"load_state_dict({loader})", theirs, 2.5, "does not prove that every value arrived")
    return Row(LOADING, f"load_into, {what}", (name,), ours, (rival,), megabytes=67)


def _groups(work: str) -> Row:
    rival = Rival("their ids in a set", timed("groups ids"), 25.0, "the least work: one pass over the names")
    return Row(LOADING, f"{work} groups of 16,000 parameters", (), timed(f"groups {work}"), (rival,))


ROWS = (
    Row(START, "--help", (), ckpt("--help"), (IMPORT_CLICK, sft("--help", 0.3), _other("--help"))),
    Row(
        START,
        "show a small file",
        (SMALL,),
        ckpt(f"show {SMALL}"),
        (
            IMPORT_CLICK,
            sft(f"info {SMALL}", 0.3, "prints sums only, no tensor"),
            _other(f"info {SMALL}", FIRST_50),
            _torch("safe_open with torch", f"shapes {SMALL}", 0.5),
        ),
    ),
    Row(
        START,
        "check a small file",
        (SMALL,),
        ckpt(f"check {SMALL}", None),
        (sft(f"check {SMALL}", None, ACCEPTS), _other(f"validate {SMALL}", NO_VALUE)),
        seconds=0.25,
    ),
    Row(
        START,
        "stats of a small file",
        (SMALL,),
        ckpt(f"stats {SMALL}"),
        (sft(f"stat {SMALL}", None, FEWER_SUMS), _other(f"stats {SMALL}", NO_VALUE)),
        seconds=0.25,
    ),
    Row(
        NAMES,
        "diff, all keys renamed",
        (A, RENAMED),
        ckpt(f"diff {A} {RENAMED}", 1),
        (
            parsed(2.5, A, RENAMED),
            sft(f"diff {A} {RENAMED}", None, NO_RULE),
            _other(f"diff {A} {RENAMED}", NO_RULE),
        ),
        megabytes=400,
    ),
    Row(
        NAMES,
        "diff, same keys",
        (A, AGAIN),
        ckpt(f"diff {A} {AGAIN}"),
        (parsed(2.5, A, AGAIN), sft(f"diff {A} {AGAIN}"), _other(f"diff {A} {AGAIN}")),
        megabytes=400,
    ),
    Row(
        NAMES,
        "remap, every key renamed",
        (A, RENAMED),
        ckpt(f"remap {A} -o out.safetensors --rename 'layers.*=blocks.*'"),
        (
            parsed(4.0, A, RENAMED),
            sft(rf"rename {A} --sub '^layers\.' --sub blocks. -o out-sft.safetensors", None, NO_FLUSH),
        ),
        megabytes=400,
    ),
    Row(
        NAMES,
        "show every row",
        ("rows.safetensors",),
        ckpt("show rows.safetensors --expand"),
        (
            _torch("json.loads and print", "parse_and_print rows.safetensors", 1.5, "does not check the header"),
            sft("tree rows.safetensors"),
        ),
        megabytes=700,
    ),
    Row(
        NAMES,
        "list a torch file",
        ("many.pt",),
        ckpt("show many.pt --expand"),
        (
            _torch("torch.load(mmap)", "torch_list many.pt", 0.2),
            Rival("ptloader", peer("ptloader", "script ptloader_list many.pt"), None, "reads every value"),
            _other("info many.pt", FIRST_50),
        ),
    ),
    Row(
        NAMES,
        "align two models",
        ("theirs.safetensors", "mine.safetensors"),
        ckpt("align theirs.safetensors mine.safetensors", None),
        (parsed(30.0, "theirs.safetensors", "mine.safetensors"),),
        megabytes=200,
    ),
    Row(
        COPIES,
        "rename",
        (LARGE,),
        ckpt(f"remap {LARGE} -o out.safetensors --rename 'module.*=*'"),
        (
            flushed_copy(LARGE),
            sft(rf"rename {LARGE} --sub '^module\.' --sub '' -o out-sft.safetensors", None, NO_FLUSH),
        ),
        megabytes=30,
    ),
    Row(
        COPIES,
        "convert .pt to safetensors",
        ("large.pt",),
        ckpt("convert large.pt -o out.safetensors"),
        (
            flushed_copy("large.pt"),
            sft("convert large.pt -o out-sft.safetensors", None, NO_FLUSH),
            _torch("torch.load, save_file", "torch_convert large.pt out-torch.safetensors"),
        ),
        megabytes=30,
    ),
    Row(
        COPIES,
        "merge: overlay",
        (LARGE, TUNED),
        ckpt(f"merge {LARGE} {TUNED} -o out.safetensors"),
        (
            flushed_copy(TUNED),
            sft(
                f"cat {LARGE} {TUNED} --allow-duplicates -o out-sft.safetensors",
                None,
                f"does not compare shapes; {NO_FLUSH}",
            ),
            _torch("load_file twice, save_file", f"torch_overlay {LARGE} {TUNED} out-torch.safetensors"),
        ),
        megabytes=30,
    ),
    Row(
        COPIES,
        "copy one model whole",
        (TUNED, "passthrough.yml"),
        ckpt(f"convert {TUNED} -o out.safetensors"),
        (flushed_copy(TUNED), _mergekit("passthrough")),
        megabytes=30,
    ),
    Row(
        COPIES,
        "shards of 200 MB",
        (LARGE,),
        ckpt(f"convert {LARGE} -o out-shards --max-shard-size 200MB"),
        (flushed_copy(LARGE), sft(f"split {LARGE} --max-size 200MB -o out-{{index}}.safetensors", None, NO_FLUSH)),
        megabytes=30,
    ),
    Row(
        COPIES,
        "rename in a .pt",
        ("large.pt",),
        ckpt("remap large.pt -o out.pt --rename 'module.layers.*=h.*'"),
        (flushed_copy("large.pt", 1.5), _torch("torch.load, torch.save", "torch_rename large.pt out-torch.pt")),
        megabytes=150,
    ),
    Row(
        COPIES,
        "rename in a training run",
        ("run.pt",),
        ckpt("remap run.pt -o out.pt --rename 'module.layers.*=h.*'"),
        (flushed_copy("run.pt", 1.5), _torch("torch.load, torch.save", "torch_rename run.pt out-torch.pt")),
        megabytes=150,
    ),
    Row(
        COPIES,
        "rename beside a million entries",
        ("million.pt",),
        ckpt("remap million.pt -o out.pt --rename 'layers.*=h.*'"),
        (_torch("torch.load, torch.save", "torch_rename million.pt out-torch.pt"),),
        seconds=3.0,
        megabytes=300,
    ),
    Row(
        VALUES,
        "cast F32 to BF16",
        (LARGE,),
        ckpt(f"convert {LARGE} -o out.safetensors --dtype BF16"),
        (
            _torch("load_file, cast, save_file", f"torch_cast {LARGE} out-torch.safetensors", 0.4, NO_LOSSES),
            moved(0.5, LARGE, limit=1.2),
            sft(f"cast {LARGE} --dtype bf16 -o out-sft.safetensors", None, f"{NO_LOSSES}; {NO_FLUSH}"),
        ),
        megabytes=200,
    ),
    Row(
        VALUES,
        "stats",
        (LARGE,),
        ckpt(f"stats {LARGE}"),
        (
            sft(f"stat {LARGE}", 0.25, FEWER_SUMS),
            _torch("five sums in torch", f"torch_stats {LARGE}", None, FIVE_SUMS),
            _other(f"stats {LARGE}", NO_VALUE),
        ),
        megabytes=200,
    ),
    Row(
        VALUES,
        "check",
        (LARGE,),
        ckpt(f"check {LARGE}", None),
        (
            sft(f"check {LARGE}", 0.8, ACCEPTS),
            sft(f"stat {LARGE} --check", None, ONLY_FINITE),
            _torch("isfinite in torch", f"torch_finite {LARGE}", None, ONLY_FINITE),
            _other(f"validate {LARGE}", NO_VALUE),
        ),
        megabytes=200,
    ),
    Row(
        VALUES,
        "check a .pt",
        ("large.pt",),
        ckpt("check large.pt", None),
        (
            _torch("CRC-32 and isfinite in torch", "checksum_and_finite large.pt", 1.0, ONLY_FINITE),
            _other("validate large.pt", NO_VALUE),
        ),
        megabytes=200,
    ),
    Row(
        VALUES,
        "check --no-values of a .pt",
        ("large.pt",),
        ckpt("check large.pt --no-values", None),
        (_torch("CRC-32", "checksum large.pt", 1.3, "one sum of the whole file, not one for each record"),),
        megabytes=100,
    ),
    Row(
        VALUES,
        "check tensors of 16 bytes",
        (A,),
        ckpt(f"check {A}", None),
        (sft(f"check {A}", None, ACCEPTS),),
        seconds=1.5,
        megabytes=400,
    ),
    Row(
        VALUES,
        "stats of tensors of 16 bytes",
        (A,),
        ckpt(f"stats {A}"),
        (sft(f"stat {A}", None, FEWER_SUMS),),
        seconds=1.5,
        megabytes=400,
    ),
    *(
        Row(
            VALUES,
            f"{work}, {dtype}",
            (f"{dtype}.safetensors",),
            ckpt(f"{work} {dtype}.safetensors", None),
            (_torch(name, f"{function} {dtype}.safetensors", None, differs),),
            megabytes=200,
        )
        for work, name, function, differs in (
            ("check", "extremes in torch", "torch_extremes", "finds NaN, Inf and extremes only"),
            ("stats", "five sums in torch", "torch_stats", FIVE_SUMS),
        )
        for dtype in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int8")
    ),
    Row(
        VALUES,
        "diff --values, equal files",
        (LARGE, "copy.safetensors"),
        ckpt(f"diff {LARGE} copy.safetensors --values"),
        (
            Rival("cmp", shell(f"cmp {LARGE} copy.safetensors"), 2.0, "compares the bytes of whole files"),
            _memcmp(LARGE, "copy.safetensors", 2.0),
            sft(f"diff {LARGE} copy.safetensors --delta", 0.17),
            _tensortracker(LARGE, "copy.safetensors"),
        ),
        megabytes=100,
    ),
    Row(
        VALUES,
        "diff --values, every number changed",
        (LARGE, TUNED, "large-model", "tuned-model"),
        ckpt(f"diff {LARGE} {TUNED} --values", 1),
        (
            _memcmp(LARGE, TUNED, 3.4),
            _torch("a loop in torch", f"torch_compare {LARGE} {TUNED}", None, "does not judge NaN, Inf and dtypes"),
            sft(f"diff {LARGE} {TUNED} --delta", 0.17),
            Rival(
                "weightscope diff",
                peer("weightscope", "weightscope diff large-model tuned-model"),
                None,
                "leaves out changes of at most 1e-6",
            ),
            _tensortracker(LARGE, TUNED),
        ),
        megabytes=100,
    ),
    Row(
        VALUES,
        "diff --values of BF16, every number changed",
        (HALF, OTHER_HALF),
        ckpt(f"diff {HALF} {OTHER_HALF} --values", 1),
        (_memcmp(HALF, OTHER_HALF, 6.7), sft(f"diff {HALF} {OTHER_HALF} --delta", 0.17)),
        megabytes=100,
    ),
    Row(
        VALUES,
        "diff --values, tensors of 16 bytes",
        (A, AGAIN),
        ckpt(f"diff {A} {AGAIN} --values", 1),
        (sft(f"diff {A} {AGAIN} --delta"),),
        seconds=3.0,
        megabytes=400,
    ),
    Row(
        VALUES,
        "diff --values, small files",
        (SMALL, "small-tuned.safetensors"),
        ckpt(f"diff {SMALL} small-tuned.safetensors --values", 1),
        (sft(f"diff {SMALL} small-tuned.safetensors --delta"),),
        seconds=0.25,
    ),
    Row(
        VALUES,
        "dequantise Q4_K",
        ("blocks.gguf",),
        ckpt("convert blocks.gguf -o out.safetensors --dequantize"),
        (_torch("gguf-py, save_file", "gguf_dequantize blocks.gguf out-gguf.safetensors", 0.8),),
        megabytes=200,
    ),
    Row(
        VALUES,
        "dequantise fp8 in blocks, to BF16",
        ("fp8.safetensors",),
        ckpt("convert fp8.safetensors -o out.safetensors --dequantize --dtype BF16"),
        (_torch("torch, save_file", "torch_dequantize fp8.safetensors out-torch.safetensors", 0.8),),
        megabytes=100,
    ),
    Row(
        VALUES,
        "dequantise nf4, to BF16",
        ("nf4.safetensors",),
        ckpt("convert nf4.safetensors -o out.safetensors --dequantize --dtype BF16"),
        (
            Rival(
                "bitsandbytes, save_file",
                peer("bitsandbytes", "script bitsandbytes_dequantize nf4.safetensors out-theirs.safetensors"),
                0.8,
            ),
        ),
        megabytes=100,
    ),
    Row(
        VALUES,
        "dequantise GPTQ, to BF16",
        ("gptq-model",),
        ckpt("convert gptq-model -o out.safetensors --dequantize --dtype BF16"),
        (_torch("torch, save_file", "torch_gptq gptq-model out-torch.safetensors", 0.8),),
        megabytes=200,
    ),
    Row(
        VALUES,
        "digest",
        (LARGE,),
        ckpt(f"digest {LARGE}"),
        (Rival("sha256sum", shell(f"sha256sum {LARGE}"), 1.0, ONE_HASH),),
        megabytes=50,
    ),
    Row(
        VALUES,
        "digest of tensors of 16 bytes",
        (A,),
        ckpt(f"digest {A}"),
        (Rival("hashlib over safetensors", script(f"hash_tensors {A}"), 2.0, "knows no shape and no dtype"),),
        seconds=3.0,
        megabytes=400,
    ),
    _load("F32", "load126.safetensors", "512 float32"),
    _load("F32, first call", "load126.safetensors", "512 float32", "load_once"),
    _load("BF16", "load420.safetensors", "1024 bfloat16"),
    _load("BF16, first call", "load420.safetensors", "1024 bfloat16", "load_once"),
    _load("a .pt", "load420.pt", "1024 float32"),
    _load("a legacy .pth", "load420.pth", "1024 float32"),
    _groups("validate"),
    _groups("build"),
    _merge("linear", 1.5, f"--weight base=0.2 {WEIGHTS}", BASE, MATH, CODE),
    _merge("slerp", 2.5, "--param t=0.3", BASE, MATH),
    *(
        _merge(method, 6.0, f"--base base {WEIGHTS} --density 0.5", BASE, MATH, CODE)
        for method in ("ties", "dare_ties", "della")
    ),
    *(
        row
        for words, name in (("an adapter merged", "adapted"), ("every number tuned", "trained"))
        for bits, dtype in ((32, "F32"), (16, "BF16"))
        for row in (
            _delta(f"{dtype}, {words}", f"plain{bits}.safetensors", f"{name}{bits}.safetensors"),
            _apply(
                f"{dtype}, {words}",
                f"plain{bits}.safetensors",
                f"{name}{bits}-patch.safetensors",
                f"{name}{bits}.safetensors",
            ),
        )
    ),
)
