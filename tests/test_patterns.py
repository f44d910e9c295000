"""The pattern language: which keys a pattern matches, and the new names that a template gives."""

from __future__ import annotations

import json
import signal
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.core.patterns import literal, matches_any, parse_pattern, parse_rename, parse_template, suggest_pattern
from ckptkit.core.patterns.matching import match_tokens
from ckptkit.errors import RuleError
from ckptkit.render.page import join_rows
from tests.helpers_cli import ROOT

KEYS = st.text(string.ascii_lowercase + string.digits + "._", min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        pytest.param("layers.1", ["layers.1"], ["layers.10", "layers.1.w", "xlayers.1", "layersx1"], id="whole key"),
        pytest.param("*", ["", "a", "a.b.c", "a\nb"], [], id="star is anything"),
        pytest.param("h.*.w", ["h.0.w", "h.0.attn.w", "h..w"], ["h.w", "h.0.w.x"], id="star crosses dots"),
        pytest.param("h.{i}.w", ["h.0.w", "h.attn.w"], ["h.0.attn.w", "h..w"], id="capture is one segment"),
        pytest.param(
            "h.{i:int}.w", ["h.0.w", "h.007.w"], ["h.x.w", "h.1a.w", "h.-1.w", "h.\u0663.w"], id="int capture"
        ),
        pytest.param("{a}.{b}.{a}", ["x.y.x", "1.1.1"], ["x.y.z", "x.y.xx"], id="repeated capture"),
        pytest.param("{i:int}.{i:int}", ["3.3"], ["3.03", "3.4"], id="repeated int capture"),
        pytest.param("a.b+c(d)[e]?^$|\\", ["a.b+c(d)[e]?^$|\\"], ["aXb+c(d)[e]?^$|\\"], id="all else is literal"),
        pytest.param("h.{0..12}.w", ["h.0.w", "h.7.w", "h.12.w"], ["h.13.w", "h.07.w", "h.1.2.w", "h.w"], id="range"),
        pytest.param("h{2,4..6}*", ["h2", "h5.w"], ["h3", "h25", "h55.w", "2"], id="list of numbers and ranges"),
        pytest.param("*.{0..99999}.{7}", ["a.0.7", "h.99999.7"], ["h.100000.7", "h.5.8", "h.05.7"], id="long range"),
        pytest.param("layer{i}.w", ["layer12.w"], ["layer.w", "layer1.2.w"], id="capture inside a segment"),
        pytest.param("re:h\\.\\d+", ["h.1", "h.12"], ["h.1.w", "xh.1", "h.x"], id="regex, full match"),
        pytest.param("re:a.b", ["a\nb"], ["ab"], id="regex, dot is any character"),
        pytest.param("re:(?i)W", ["w", "W"], ["ww"], id="regex, flags"),
        pytest.param("re:", [""], ["a"], id="regex, empty"),
        pytest.param("0012", ["0012"], ["12", "00120"], id="digits are text"),
        pytest.param("1e5", ["1e5"], ["100000", "1e50"], id="numbers are text"),
    ],
)
def test_a_pattern_fits_whole_keys(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    parsed = parse_pattern(pattern)
    assert [key for key in fits if parsed.match(key) is None] == []
    assert [key for key in fits_not if parsed.match(key) is not None] == []
    assert matches_any([parse_pattern("no.such"), parsed], fits[0])
    assert not matches_any([], fits[0])


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        pytest.param("", "is empty", id="empty"),
        pytest.param("a.{", "brace", id="open brace"),
        pytest.param("a.}", "brace", id="closing brace"),
        pytest.param("a.{}", "brace", id="no name"),
        pytest.param("a.{1x}", "brace", id="name begins with a digit"),
        pytest.param("a.{0-5}", "brace", id="range with a hyphen"),
        pytest.param("a.{00..05}", "brace", id="leading zeros"),
        pytest.param("a.{5..0}", "ends before it begins", id="range that ends before it begins"),
        pytest.param("a.{_0}.*", "brace", id="name of a star's own group"),
        pytest.param("a.{x:float}", "brace", id="unknown kind"),
        pytest.param("a.{x+1}", "brace", id="arithmetic on the left"),
        pytest.param("re:(", "is not a valid regular expression", id="open group"),
        pytest.param("re:a{99999999999999999999}", "is not a valid regular expression", id="overflow"),
        pytest.param("re:" + "(" * 5000, "is not a valid regular expression", id="nested too deeply"),
        pytest.param("re:(?a)(?u)x", "is not a valid regular expression", id="flags that exclude each other"),
        pytest.param("re:(?<=a*)b", "is not a valid regular expression", id="variable look-behind"),
    ],
)
def test_invalid_patterns_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(RuleError, match=reason):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("rename", "old", "new"),
    [
        pytest.param("module.*=*", "module.fc.weight", "fc.weight", id="strip a prefix"),
        pytest.param("*=model.*", "fc.weight", "model.fc.weight", id="add a prefix"),
        pytest.param("*.gamma=*.weight", "bn.gamma", "bn.weight", id="a suffix"),
        pytest.param(
            "h.{i}.attn.*=layers.{i}.self_attn.*", "h.3.attn.q.w", "layers.3.self_attn.q.w", id="capture, star"
        ),
        pytest.param("*.a.*=*.b.*", "x.a.y", "x.b.y", id="stars in order"),
        pytest.param("*.a.*=*.b.*", "x.a.y.a.z", "x.a.y.b.z", id="the first star takes the most"),
        pytest.param("{a}.{b}={b}.{a}", "x.y", "y.x", id="captures by name"),
        pytest.param("{a}.{b}={a}", "x.y", "x", id="a capture may be left out"),
        pytest.param("{a}.w={a}.{a}.w", "x.w", "x.x.w", id="a capture may come twice"),
        pytest.param("b.{i:int}.*=b.{i+1}.*", "b.9.w", "b.10.w", id="plus"),
        pytest.param("b.{i:int}.*=b.{i-10}.*", "b.10.w", "b.0.w", id="minus, down to zero"),
        pytest.param("b.{i:int}.*=b.{i+0}.*", "b.007.w", "b.7.w", id="counting makes a number"),
        pytest.param("b.{i:int}.*=c.{i}.*", "b.007.w", "c.007.w", id="without counting digits stay"),
        pytest.param("b.{i:int}=b.{i+1}", "b." + "9" * 18, "b.1" + "0" * 18, id="18 digits"),
        pytest.param("re:h\\.(\\d+)\\.(.*)=layers.\\1.\\2", "h.3.w", "layers.3.w", id="regex, by number"),
        pytest.param("re:(?P<x>.*)_g=\\g<x>", "w_g", "w", id="regex, by name"),
        pytest.param("re:a=b=c", "a=b", "c", id="regex, the last = divides"),
        pytest.param("re:(a)|(b)=x\\2", "a", "x", id="regex, a group that took no part is empty"),
        pytest.param("a=", "a", "", id="an empty name is the rules' matter"),
        pytest.param("module.*=*", "fc.module.w", None, id="fits not"),
    ],
)
def test_a_rename_says_the_new_name(rename: str, old: str, new: str | None) -> None:
    assert parse_rename(rename).apply(old) == new


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        pytest.param("module.*", "OLD=NEW", id="no ="),
        pytest.param("re:module", "OLD=NEW \\(for example", id="regex, no ="),
        pytest.param("a=b=c", "OLD=NEW", id="two ="),
        pytest.param("=a", "is empty", id="nothing on the left"),
        pytest.param("h.*=a", "did you mean 'h.\\*=a.\\*'", id="a star is forgotten"),
        pytest.param(r"h.(.*)=a.\1", r"begins with re: 're:h\.\(\.\*\)=a\.\\1'", id="regex without re:"),
        pytest.param("*=a", "1 '\\*' on the left and 0 on the right", id="a star is lost"),
        pytest.param("a=*", "0 '\\*' on the left and 1 on the right", id="a star from nowhere"),
        pytest.param("*.*=*", "2 '\\*' on the left and 1 on the right", id="one of two stars is lost"),
        pytest.param("a.{i}=b.{j}", "'a.{i}' does not capture", id="unbound capture"),
        pytest.param("a.{i}=b.{i+1}", "does arithmetic on {i}", id="arithmetic on text"),
        pytest.param("a.{i:int}=b.{i:int}", "brace", id="a kind on the right"),
        pytest.param("a.{i:int}=b.{i+}", "brace", id="nothing to add"),
        pytest.param("a.{i:int}=b.{i*2}", "brace", id="no multiplication"),
        pytest.param("a.{i:int}=b.{i+" + "9" * 5000 + "}", "brace", id="a number without end"),
        pytest.param("a.{0..3}=b.{0..3}", "brace", id="a range on the right"),
        pytest.param("a=b}", "brace", id="stray brace on the right"),
        pytest.param("re:a=\\1", "is not a valid template for", id="regex, no such group"),
        pytest.param("re:a=\\g<x>", "is not a valid template for", id="regex, no such name"),
        pytest.param("re:a=\\", "is not a valid template for", id="regex, bad escape"),
    ],
)
def test_a_rename_that_cannot_work_is_refused_before_any_key_is_seen(rename: str, reason: str) -> None:
    with pytest.raises(RuleError, match=reason):
        parse_rename(rename)


@pytest.mark.parametrize(
    ("rename", "key", "reason"),
    [
        pytest.param("b.{i:int}.*=b.{i-1}.*", "b.0.w", "the negative index -1", id="below zero"),
        pytest.param("b.{i:int}=b.{i+1}", "b." + "9" * 19, "19 digits", id="too many digits"),
    ],
)
def test_invalid_arithmetic_names_the_key(rename: str, key: str, reason: str) -> None:
    with pytest.raises(RuleError, match=reason) as caught:
        parse_rename(rename).apply(key)
    assert key in caught.value.reason


@given(KEYS)
def test_every_key_without_signs_is_a_pattern_for_itself_alone(key: str) -> None:
    pattern = parse_pattern(key)
    assert pattern.match(key) is not None
    assert pattern.match(f"{key}0") is None
    assert parse_template(key, parse_pattern("x")).apply("x") == key


@given(KEYS, KEYS)
def test_adding_a_prefix_then_stripping_it_is_identity(key: str, prefix: str) -> None:
    added = parse_rename(f"*={prefix}.*").apply(key)
    assert added == f"{prefix}.{key}"
    assert parse_rename(f"{prefix}.*=*").apply(added) == key


@settings(max_examples=500)
@given(
    st.lists(
        st.sampled_from(["*", "a", "b", ".", "ab", "1", "{x}", "{y}", "{i:int}", "{j:int}", "{0..2}", "{1,11}"]),
        min_size=1,
        max_size=7,
    ),
    st.lists(st.text("ab.1é", max_size=12), min_size=1, max_size=8),
)
def test_stars_and_captures_match_as_in_a_regex(parts: list[str], keys: list[str]) -> None:
    """For a long key, a table of positions replaces the regex; both find the same texts for stars and captures."""
    pattern = parse_pattern("".join(parts))
    for key in keys:
        oracle = pattern.regex.fullmatch(key)
        for match in (pattern.match(key), match_tokens(pattern.tokens, key, pattern.text)):
            assert (match is None) == (oracle is None)
            if match is not None and oracle is not None:
                assert [match[name] for name in oracle.groupdict()] == list(oracle.groupdict().values())


LONG = {
    "*a*a*a*b": "a" * 3000,
    "*a*a*{x}*a*b": "a" * 3000,
    "*a*b*c*d*a*b*d": "abcd" + "a" * 1000 + "b" * 1000 + "d",
    "*" * 50 + "b": "a" * 3000,
    "{a}{b}{c}{d}{e}x": "a" * 3000 + ".x",
    "*{a:int}*{b:int}*{c:int}*{d:int}*x": "1" * 3000 + "ay",
    "*.{i:int}.*.{j:int}.*.{k:int}.*.weight": "a.1." * 3000 + "bias",
    "*.{a}.{a}.*.{b}.{b}z": "a.b." * 1000,
    "*{a}*{a}x": "a" * 500 + ".x",
    "*é*é*{x}y": "é" * 3000,
}
IN_A_PROCESS = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # a regex would take hours
from ckptkit.core.patterns import parse_pattern
for pattern, key in json.load(sys.stdin).items():
    parse_pattern(pattern).match(key)
"""


def test_stars_and_captures_over_a_long_key_end_in_time() -> None:
    """The time for one key grows with the length of the key, not with a power of it."""
    task = json.dumps(LONG)
    subprocess.run([sys.executable, "-c", IN_A_PROCESS], input=task, text=True, cwd=ROOT, check=True)


def test_a_capture_that_could_have_too_many_texts_is_refused() -> None:
    with pytest.raises(RuleError, match="takes too long to match a key of 4,001 characters"):
        parse_pattern("*{a}*{a}x").match("a" * 4000 + "x")


SLOW = {
    "re:(a+)+$": "a" * 40 + "!",
    "re:(a|a)*$": "a" * 40 + "!",
    "re:(?=(.*a){20}).*": "a" * 60 + "!",
    "re:.*.*.*.*.*=": "a" * 800,
    "re:" + "a?" * 28 + "a{28}": "a" * 27 + "!",
    "re:(a{1,30}){1,30}$": "a" * 50 + "!",
}


@pytest.mark.parametrize("pattern", list(SLOW)[:2])
def test_a_regex_that_takes_too_long_is_refused(pattern: str) -> None:
    """The processor time of one match is limited in the main thread, and the error names the pattern."""
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(RuleError, match="takes too long to match a key of 41 characters") as refused:
        parse_pattern(pattern).match(SLOW[pattern])
    assert pattern in refused.value.reason
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_in_another_thread_a_regex_that_could_take_too_long_is_refused() -> None:
    """Another thread gets no signal, so the repetitions of a regex decide; usual regexes are matched."""
    usual = {"re:(.*)\\.(\\d+)\\.(.*)": "h.1.w", "re:layers\\.(?:\\d+)\\.[a-z_]+\\.weight": "layers.0.q_proj.weight"}
    with ThreadPoolExecutor(1) as threads:
        for pattern, key in SLOW.items():
            with pytest.raises(RuleError, match="takes too long"):
                threads.submit(parse_pattern(pattern).match, key).result()
        assert all(threads.submit(parse_pattern(pattern).match, key).result() for pattern, key in usual.items())


def test_a_regex_with_an_unusual_set_causes_no_warning() -> None:
    """The tests turn every warning into an error, and Python warns of a set that could mean another in future."""
    assert parse_pattern("re:[[a]").match("[") is not None
    assert parse_rename("re:([[a])=\\1x").apply("a") == "ax"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("h.[23].w", "did you mean 'h.{2,3}.w'?"),
        ("h.[0-1].*", "did you mean 'h.{0..1}.*'?"),
        ("conv", "did you mean '*conv*'?"),
        ("haed", "did you mean 'head.*'?"),
        ("model.layers.*.mpl.*", "did you mean 'model.layers.*.mlp.*'?"),
        ("model.layer.*.mlp.*", "did you mean 'model.layers.*.mlp.*'?"),
        ("model.layers.*.attention.*", "the nearest name is 'model.layers.0.reparam_conv.w'"),
        (r"h\.\d+\.w", r"did you mean 're:h\.\d+\.w'?"),
        (r"model\.layers\.\d+", r"did you mean 're:model\.layers\.\d+\..*'?"),
        ("h.*,head.*", "these are 2 patterns, and each needs its own option: 'h.*', 'head.*'"),
    ],
)
def test_a_hint_has_the_pattern_that_was_meant(pattern: str, hint: str) -> None:
    names = [f"h.{number}.w" for number in range(12)]
    names += ["head.w", "model.layers.0.mlp.w", "model.layers.0.reparam_conv.w"]
    assert suggest_pattern(parse_pattern(pattern), names) == hint


@pytest.mark.parametrize(
    ("rename", "meant", "renamed"),
    [
        ("head=top", "head.*=top.*", ("head.w", "top.w")),
        ("haed.*=top.*", "head.*=top.*", ("head.w", "top.w")),
        ("head.w=w", "*.head.w=*.w", ("model.head.w", "model.w")),
        (r"h.(\d+)=x.\1.fc", r"re:h.(\d+)(\..*)=x.\1.fc\2", ("h.3.w", "x.3.fc.w")),
        (r"h.(\d+).w=x.\1", r"re:h.(\d+).w=x.\1", ("h.3.w", "x.3")),
        (r"re:h.(\d+)=x.\1", r"re:h.(\d+)(\..*)=x.\1\2", ("h.3.w", "x.3.w")),
    ],
)
def test_a_hint_has_the_whole_rename_that_was_meant(rename: str, meant: str, renamed: tuple[str, str]) -> None:
    """The rename in a hint gives a key the new name that was meant, with the rest of the key."""
    wrong = parse_rename(rename)
    hint = suggest_pattern(wrong.pattern, [renamed[0]], new=wrong.text)
    pasted = hint.removeprefix("did you mean '").removesuffix("'?")
    assert (pasted, parse_rename(pasted).apply(renamed[0])) == (meant, renamed[1])


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [2, 3], [0, 1, 2, 5, 7, 8, 9]])
def test_a_joined_row_is_a_pattern_for_its_keys(indices: list[int]) -> None:
    """What a table shows for several keys, without its count, can be pasted as a pattern."""
    keys = [f"h.{number}.w" for number in range(12)]
    ((row,),) = join_rows((keys[number], ()) for number in indices)
    pattern = parse_pattern(row.partition(" ")[0])
    assert [key for key in keys if pattern.match(key)] == [keys[number] for number in indices]


@given(st.text() | st.text("a*{}.:r=e", max_size=12))
def test_a_literal_pattern_fits_its_key_alone(key: str) -> None:
    """``literal`` gives a pattern for any key, and the pattern matches no other key."""
    pattern = parse_pattern(literal(key))
    assert pattern.match(key) is not None
    assert pattern.match(f"{key}x") is None
    assert pattern.match(f"x{key}") is None
