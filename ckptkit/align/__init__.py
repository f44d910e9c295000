"""``suggest_rules``: find the rules that turn the keys of one checkpoint into the keys of another, with evidence."""

from __future__ import annotations

from dataclasses import replace

from ckptkit.align.digests import Digests, read_digests
from ckptkit.align.gguf import align_gguf
from ckptkit.align.model import Alignment, Ambiguity
from ckptkit.align.search import find_rules
from ckptkit.align.ways_out import with_hints
from ckptkit.align.writing.to_rules import Suggestion
from ckptkit.core.arguments import require_flags, require_progress, takes_rules
from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo, under_key
from ckptkit.core.patterns import literal
from ckptkit.core.progress import Progress
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.rules.positions import PositionNames, name_positions

__all__ = ["Alignment", "Ambiguity", "Suggestion", "suggest_rules"]

_POSITION_CONFIDENCE = 0.9


@takes_rules
def suggest_rules(
    expected: CheckpointLike,
    found: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    digests: bool = False,
    progress: Progress | None = None,
) -> Alignment:
    """Return rules that rename the keys of ``found`` to the keys of ``expected``, each with its evidence.

    Rules follow from the names, the shapes and the order of the keys, and from the layouts of PEFT and GGUF. A tensor
    that fits in several ways is ambiguous and gets no rule. A part of a quantised weight becomes only the same part of
    another quantised weight. With digests, equal bytes decide before names: a tensor is paired with the only tensor of
    the other side that has its bytes. Bytes that several tensors have, such as zeros, decide nothing.

    Args:
        expected: A path, a Module, a Checkpoint, or a mapping of tensors or of ``TensorInfo``. What is opened here is
            closed at the end; the Checkpoints in the result then still have keys, dtypes and shapes, but no bytes.
        found: The checkpoint to rename, in any of these forms.
        rules: Renames and filters for the keys of ``found``, which come first. The result begins with them.
        digests: Compare the bytes of the tensors first. A tensor that is filled with other bytes is then reported, and
            not counted as explained.
        progress: Called with the number of bytes after each chunk that is read for the digests.

    Raises:
        ModelError: One side is not a state_dict.
        RuleError: ``rules`` are not valid for the keys of ``found``.
        PlanError: Digests are asked for, but one side is a description without bytes.
        PathError: A path cannot be read.
        FormatError: The bytes of a file cannot be read.

    Example:
        >>> suggest_rules("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt").complete
        True
    """
    require_flags(digests=digests)
    require_progress(progress)
    with opened(expected, "expected") as expected_side, opened(found, "found") as found_side:
        given = rules_for(rules, found_side, expected_side)
        named = None if given.stages else name_positions(found_side, expected_side)
        if named is not None:
            return _by_position(named, expected_side, found_side)
        by_architecture = None if given.stages or digests else align_gguf(expected_side, found_side)
        if by_architecture is not None:
            return by_architecture
        renamed, sources = _renamed(found_side, given, expected_side)
        known = read_digests(expected_side, renamed, progress) if digests else Digests()

        def try_rules(rules: Rules) -> Alignment:
            again, sources_again = _renamed(found_side, rules, expected_side)
            by_source = {sources[key]: digest for key, digest in known.found.items()}
            moved = {key: by_source[source] for key, source in sources_again.items() if source in by_source}
            read = replace(known, found=moved, sides=(expected_side, again)) if digests else known
            return find_rules(expected_side, again, read, rules)

        may_read = not digests and all(side.files for side in (expected_side, found_side))
        return with_hints(find_rules(expected_side, renamed, known, given), try_rules, may_read=may_read)


def _renamed(found: Checkpoint, rules: Rules, expected: Checkpoint) -> tuple[Checkpoint, dict[str, str]]:
    """Return a checkpoint with the new names, and the first source of each new name.

    The bytes of tensors that operations make cannot be read.
    """
    if not rules.stages:
        return found, {key: key for key in found}
    key_map = apply_rules(rules, found, expected)
    outputs = key_map.outputs()
    infos = {key: under_key(info, key) for key, info in key_map.describe(found).items()}

    def payload(info: TensorInfo) -> Payload:
        derivation = outputs[info.key]
        if derivation.recipe is not None:
            raise PlanError(f"{quoted(info.key)} is made by operations, so that its bytes cannot be compared")
        return found.payload(derivation.sources[0])

    description = Description(found.path, found.format, found.files, found.envelope, found.entries)
    sources = {key: derivation.sources[0] for key, derivation in outputs.items()}
    return Checkpoint(infos, Access(payload), description), sources


def _by_position(named: PositionNames, expected: Checkpoint, found: Checkpoint) -> Alignment:
    """Return a rule for each numbered tensor, which names alone could not give."""
    filled = {name for names in named.names.values() for name in names}
    return Alignment(
        expected,
        found,
        (),
        tuple(
            Suggestion(
                (literal(key),),
                tuple(map(literal, names)),
                (),
                named.rule,
                _POSITION_CONFIDENCE,
                dict.fromkeys(names, (key,)),
                sum(expected[name].elements for name in names),
            )
            for key, names in named.names.items()
        ),
        (),
        (),
        tuple(info for key, info in expected.items() if key not in filled),
        tuple(found[key] for key in named.dropped),
        note=named.note,
    )
