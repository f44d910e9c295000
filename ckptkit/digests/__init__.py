"""``digest``: hashes of the contents of a checkpoint that do not depend on its format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptkit.core.arguments import require_choice, require_flags, require_progress
from ckptkit.core.checkpoint import Checkpoint, under_key
from ckptkit.core.checkpoint.stored import has_stored_bytes
from ckptkit.core.progress import Progress
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import plural, quoted
from ckptkit.core.ties import first_of_ties
from ckptkit.digests.by_key import hash_each
from ckptkit.digests.hashing import ALGORITHMS, hash_function
from ckptkit.digests.model import Digests, TensorDigest
from ckptkit.errors import PlanError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.rules.apply import renamed_keys
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.sharing import Sharing, require_shareable, sharing_of
from ckptkit.values.endless import refuse_endless
from ckptkit.values.workers import Workers

__all__ = ["Digests", "TensorDigest", "digest", "digest_opened", "digests_by_key"]


def digest(
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    algorithm: str = "sha256",
    skip_unread: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Digests:
    """Return a digest of each tensor, which depends on its dtype, its shape and its bytes, and on nothing else.

    The same tensors have the same digests in every format, in one file or many, under any name and in any order. The
    bytes are those of a contiguous tensor: row-major and little-endian. Blocks of GGUF are hashed as they are stored.
    Each byte is read once, in bounded memory. Both fingerprints cover exactly the tensors that are listed. Other
    entries and metadata are in no digest.

    Args:
        checkpoint: A path, a Checkpoint, a Module or a mapping of tensors. What is opened here is closed at the end.
        rules: Rules that keep, drop and rename keys, or the path of a rule file.
        algorithm: ``"sha256"``, or ``"xxh3"`` (128 bits), which needs the extra ``[fast]``. XXH3 is faster, and does
            not protect from someone who wants two checkpoints to have one digest.
        skip_unread: Leave out tensors without bytes that can be read, such as sparse tensors, instead of an error.
        progress: Called with the number of bytes after each piece.
        executor: As in ``stats``.

    Raises:
        ArgumentError: ``algorithm`` is unknown, or needs a package that is not installed; or ``checkpoint`` is not a
            path, but there is an executor.
        WorkerError: A worker ended before its task was done.
        RuleError: A rule cannot be applied, or computes a new tensor.
        ModelError: ``checkpoint`` is not a state_dict.
        PlanError: A tensor cannot be read, or ``checkpoint`` has descriptions of tensors, without bytes.
        PathError: A path cannot be read.
        FormatError: The stored bytes do not agree with the header.
        ChangedError: A file changes while it is read.

    Example:
        >>> left, right = digest({"a": torch.ones(2)}), digest({"b": torch.ones(2)})
        >>> left.tensors["a"].digest == right.tensors["b"].digest, left.contents == right.contents
        (True, False)
    """
    require_choice(algorithm, ALGORITHMS, "algorithm")
    require_flags(skip_unread=skip_unread)
    require_progress(progress)
    require_shareable(executor, {"checkpoint": checkpoint})
    hash_function(algorithm)  # a package that is missing is reported before a file is opened
    with opened(checkpoint, "checkpoint") as found:
        sharing = sharing_of(executor, [(checkpoint, found)])
        return digest_opened(found, rules_for(rules, found), algorithm, progress, sharing, skip_unread=skip_unread)


def digest_opened(
    found: Checkpoint,
    rules: Rules,
    algorithm: str,
    progress: Progress | None,
    sharing: Sharing | None,
    *,
    skip_unread: bool,
) -> Digests:
    """Return the digests of an open checkpoint, as ``digest`` does."""
    renamed = renamed_keys(rules, found)
    skipped = {key: f"it is a {found[key].kind} tensor" for key in renamed if not has_stored_bytes(found[key])}
    if skipped and not skip_unread:
        key, reason = next(iter(skipped.items()))
        more = f", and {plural(len(skipped) - 1, 'more tensor')} cannot either" if len(skipped) > 1 else ""
        raise PlanError(
            f"{quoted(key)} has no digest: {reason}{more}", hint="--skip-unread leaves out all such tensors"
        )
    keys = [key for key in renamed if key not in skipped]
    digests = digests_by_key(found, keys, algorithm, progress, sharing=sharing)
    found.check_unchanged()
    tensors = [TensorDigest(under_key(found[key], renamed[key]), found_digest) for key, found_digest in digests.items()]
    summary = CheckpointSummary.of(found, (tensor.info for tensor in tensors))
    return Digests.of(tensors, algorithm, {renamed[key]: reason for key, reason in skipped.items()}, summary)


def digests_by_key(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    algorithm: str = "sha256",
    progress: Progress | None = None,
    *,
    sharing: Sharing | None = None,
) -> Mapping[str, str]:
    """Return the digest of the tensor at each key; tied tensors are read once. Raises what reading raises."""
    infos = [checkpoint[key] for key in keys]
    refuse_endless(checkpoint, infos)
    first_of_tie = first_of_ties(infos, checkpoint.span)
    firsts = [info for info in infos if info.key not in first_of_tie]
    if sharing is None:
        with Workers() as workers:
            found = hash_each(checkpoint, firsts, algorithm, workers, progress)
    else:
        from ckptkit.digests.shared import hash_shared

        found = hash_shared(checkpoint, firsts, algorithm, sharing, progress)
    return {info.key: found[first_of_tie.get(info.key, info.key)] for info in infos}
