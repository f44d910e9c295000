"""The JSON Schemas of the documents of ``--json``, which ``python -m tests.generated`` writes to ``docs/schemas``.

Each schema is complete alone: it has the definitions that it uses, and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["SCHEMAS"]

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _object(about: str, fields: Mapping[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object that has exactly these fields."""
    return {
        "description": about,
        "type": "object",
        "properties": dict(fields),
        "required": [name for name in fields if name not in optional],
        "additionalProperties": False,
    }


def _text(about: str) -> Schema:
    return {"description": about, "type": "string"}


def _text_or_null(about: str) -> Schema:
    return {"description": about, "type": ["string", "null"]}


def _one_of(about: str, *values: str) -> Schema:
    return {"description": about, "enum": list(values)}


def _count(about: str) -> Schema:
    return {"description": about, "type": "integer", "minimum": 0}


def _count_or_null(about: str) -> Schema:
    return {"description": about, "type": ["integer", "null"], "minimum": 0}


def _flag(about: str) -> Schema:
    return {"description": about, "type": "boolean"}


def _share(about: str) -> Schema:
    return {"description": about, "type": "number", "minimum": 0, "maximum": 1}


def _share_or_null(about: str) -> Schema:
    return {**_share(about), "type": ["number", "null"]}


def _number(about: str) -> Schema:
    return _ref("number", about)


def _tolerance(about: str) -> Schema:
    return {"description": about, "anyOf": [{"type": ["number", "null"], "minimum": 0}, {"const": "inf"}]}


def _ref(name: str, about: str) -> Schema:
    return {"description": about, "$ref": f"#/$defs/{name}"}


def _ref_or_null(name: str, about: str) -> Schema:
    return {"description": about, "anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}


def _list(about: str, item: Schema | str) -> Schema:
    """Return the schema of a list; ``item`` is a schema, or the name of a definition."""
    return {
        "description": about,
        "type": "array",
        "items": {"$ref": f"#/$defs/{item}"} if isinstance(item, str) else item,
    }


def _texts(about: str) -> Schema:
    return _list(about, {"type": "string"})


def _table(about: str, values: Schema) -> Schema:
    """Return the schema of an object with any names."""
    return {"description": about, "type": "object", "additionalProperties": values}


def _any(about: str) -> Schema:
    return {"description": about}


_KEY = _text("The key in the state_dict.")
_TOTALS = {
    "tensors": _count("The number of tensors."),
    "elements": _count("The number of elements of all tensors."),
    "bytes": _count("The number of bytes of all tensors."),
}
_LOOKS = {"dtype": _ref("dtype", "The dtype."), "shape": _ref("shape", "The shape.")}
_PATH = _text("The path of the checkpoint as it was given; for a live model, py:MODULE:CALLABLE.")
_FORMAT = _text("The format of the checkpoint, such as safetensors, torch-zip or live model.")
_FINDINGS = {
    "findings": _list("The findings, in the order of the page.", "finding"),
    "summary": _ref("counts", "The number of findings of each severity."),
}
_OPTIONS = _table("The options of the group by name: numbers, text, lists. A tensor is its numbers.", _any("A value."))
_OPERATIONS = _list("The tensor operations, in order; empty for a plain renaming.", "operation")
_NUMBERS = {
    "numbers": _count("The number of values. A complex element counts as two."),
    "nan": _count("How many are NaN."),
    "posinf": _count("How many are infinite."),
    "neginf": _count("How many are negative infinite."),
    "zeros": _count("How many are 0, of either sign."),
    "zero_share": _share("The share of zeros."),
    "subnormal": _count("How many are smaller than the smallest normal number of the dtype, and not 0."),
    "min": _number("The smallest finite number; null without one."),
    "max": _number("The largest finite number; null without one."),
    "mean": _number("The mean of the finite numbers."),
    "std": _number("The standard deviation of the finite numbers, with correction=0."),
    "l1": _number("The sum of the magnitudes of the finite numbers."),
    "l2": _number("The l2 norm of the finite numbers."),
    "abs_max": _number("The largest finite magnitude."),
    "constant": _number("The value of all elements if they are equal, else null."),
    "histogram": _list(
        "Pairs [e, count] of the numbers with 2**e <= abs(x) < 2**(e + 1); zeros are in no pair.",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "integer", "minimum": 1}], "items": False,
         "minItems": 2},
    ),
}  # fmt: skip
_SKIPPED = _list(
    "The tensors that --skip-unread left out.",
    _object("A tensor.", {"key": _KEY, "reason": _text("Why it has no digest.")}),
)
_TIES = _texts("The other names of the same tied parameter.")
_DELTA_SIDE = {
    "name": _text_or_null("The last part of its path; null where that is not known."),
    **_TOTALS,
    "contents": _text("The digest of all contents, as ckpt digest prints it: ALGORITHM:HEX."),
}
_DELTA = {
    "base": _object("The checkpoint that the patch is applied to.", _DELTA_SIDE),
    "new": _object("The checkpoint that the patch makes of it.", _DELTA_SIDE),
    "tensors": _list(
        "The tensors of new, in its order.",
        _object(
            "A tensor.",
            {
                "key": _KEY,
                **_LOOKS,
                "state": _one_of(
                    "What happened to it. replaced: by another dtype or shape. renamed: its bytes are equal.",
                    "equal", "renamed", "changed", "replaced", "new",
                ),
                "base_key": _text_or_null("The key in the base, or null."),
                "was": {
                    "description": "Its dtype and shape in the base, if it was replaced, else null.",
                    "anyOf": [_object("What it was.", _LOOKS), {"type": "null"}],
                },
                "tied_to": _text_or_null("The first key of the same tied tensor of new, or null."),
                "bytes": _count("The bytes of the tensor."),
                "packed_bytes": _count("The bytes that the patch has of it."),
            },
        ),
    ),
    "dropped": _list(
        "The tensors of the base that new does not have.",
        _object("A tensor.", {"key": _KEY, **_LOOKS, "bytes": _count("The bytes of the tensor.")}),
    ),
    "left_out": _texts("The entries of new that are not tensors, and that the patch does not hold."),
    "metadata": _table("The metadata of new.", {"type": "string"}),
    "notes": _texts("What a user should know beside this."),
    "summary": _object(
        "How many tensors are in each state, and the size.",
        {
            "equal": _count("How many are equal."),
            "renamed": _count("How many are equal under another key."),
            "changed": _count("How many have other values."),
            "replaced": _count("How many have another dtype or shape."),
            "new": _count("How many the base does not have."),
            "dropped": _count("How many new does not have."),
            "share": {"description": "The bytes of the patch by those of the tensors of new.", "type": "number",
                      "minimum": 0},
        },
    ),
    "patch": _object(
        "The patch.",
        {
            "path": _text_or_null("Its path; null if nothing was written."),
            "bytes": _count("Its bytes."),
            "compression": _one_of("The compression.", "zlib", "zstd"),
            "library": _text("What wrote it."),
        },
    ),
}  # fmt: skip
_MODIFIERS = _texts("The names of the modifiers of the spec that change its options.")
_LAYER = _count_or_null("Its layer, counted from 0 at the input, where a modifier numbers layers; else null.")

_VALUES = {
    "compared": _count("The number of compared tensors; tied tensors count once."),
    "equal": _count("The number of them with equal bits."),
    "different": _list("The tensors that differ, beyond the tolerances if any; worst first.", "value_difference"),
    "within": _list("The tensors whose bits differ within the tolerances.", "value_difference"),
    "skipped": _list(
        "Tensors that were not compared.",
        _object("A tensor.", {"key": _KEY, "reason": _text("Why it was not compared.")}),
    ),
    "as_stored": _texts("Parts of quantised weights, of which codes were compared, not numbers."),
    "rtol": _tolerance("The relative tolerance; null without tolerances."),
    "atol": _tolerance("The absolute tolerance; null without tolerances."),
}
_GATES = {
    "gates": _list(
        "The gates, in the order of the options; the broken ones are in unmet too.",
        _object(
            "A gate.",
            {
                "gate": _one_of("The gate.", "expect_frozen", "expect_changed", "max_rel_l2"),
                "value": {"description": "The pattern, or the limit.", "type": ["string", "number"]},
                "tensors": _count("The number of tensors that it is about."),
                "left_out": _count("The number of tensors that the rules keep or drop leave out."),
                "holds": _flag("Whether it holds."),
                "hint": _text_or_null("What may explain that it is broken, or null."),
            },
        ),
    ),
}

_DEFINITIONS: dict[str, Schema] = {
    "dtype": {
        "description": "A dtype by its code in safetensors.",
        "type": "string",
        "examples": ["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL"],
    },
    "shape": {"description": "A shape, as in torch.", "type": "array", "items": {"type": "integer", "minimum": 0}},
    "number": {
        "description": "A number, or null where there is none. NaN and Inf are strings, because JSON has neither.",
        "anyOf": [{"type": ["number", "null"]}, {"enum": ["nan", "inf", "-inf"]}],
    },
    "tensor": _object("A tensor.", {"key": _KEY, **_LOOKS}),
    "side": _object("The tensor on one side.", _LOOKS),
    "pair": _object(
        "Two tensors that belong together and differ.",
        {
            "key": _text("The expected key."),
            "found_key": _text("The key in the found checkpoint, before rules."),
            "expected": _ref("side", "The expected tensor."),
            "found": _ref("side", "The found tensor."),
        },
    ),
    "checkpoint": _object("A checkpoint, and what is in it.", {"path": _PATH, "format": _FORMAT, **_TOTALS}),
    "unmet": _object(
        "A requirement that is not met.",
        {
            "requirement": _one_of(
                "The requirement.", "require", "min_coverage", "expect_frozen", "expect_changed", "max_rel_l2"
            ),
            "message": _text("What is not met, in one sentence."),
            "keys": _texts("The keys that would not be filled, or whose values break the gate."),
        },
    ),
    "side_counts": _object(
        "The number of elements on each side.",
        {"expected": _count("On the expected side."), "found": _count("On the found side.")},
    ),
    "values": _object("The values of the tensors that both sides have with one shape.", {**_VALUES, **_GATES}),
    "value_difference": _object(
        "How the values of one tensor differ, after found is cast to the dtype of expected. NaN and Inf are strings.",
        {
            "key": _KEY,
            "found_key": _text("The key in the found checkpoint, before rules."),
            "names": _texts("All expected keys that share the tensor: tied tensors are compared once."),
            "max_abs": _number("The largest absolute difference; null where only bytes can be compared."),
            "mean_abs": _number("The mean absolute difference of the elements that are finite on both sides, or null."),
            "rel_l2": _number(
                "|found - expected| / |expected| of these elements: Inf if expected is all zero, or null."
            ),
            "cosine": _number("The cosine of the angle between both tensors, or null if one is all zero."),
            "changed": _share_or_null("The share of the elements whose bits differ."),
            "changed_elements": _count_or_null("The number of elements whose bits differ."),
            "beyond": _count_or_null("The number of elements beyond the tolerances; null without tolerances."),
            "nonfinite": _count("The number of elements that differ and are NaN or infinite on one side."),
            "max_ulp": _count_or_null("The largest difference in units in the last place; null for integers."),
            "nan": _ref("side_counts", "The elements that are NaN."),
            "inf": _ref("side_counts", "The elements that are infinite."),
            "place": {
                "description": "The index of the element with the largest difference, or null.",
                "type": ["array", "null"],
                "items": {"type": "integer", "minimum": 0},
            },
            "values": {
                "description": "The expected and the found value of this element as text, or null.",
                "type": ["array", "null"],
                "items": {"type": "string"},
            },
        },
    ),
    "quantized": _object(
        "A quantised weight: its codes, scales and other parts together.",
        {
            "key": _text("The key of the weight."),
            "scheme": _text("The quantisation scheme."),
            "parts": _texts("The keys of its parts."),
        },
    ),
    "finding": _object(
        "A finding.",
        {
            "code": _text("The stable name of the kind of finding; the page about codes lists them."),
            "severity": _one_of("How serious it is.", "error", "warning", "note"),
            "key": _text("The tensor or parameter; empty where there is no single one."),
            "message": _text("What is wrong, in one sentence."),
            "hint": _text("What to do about it, or an empty string."),
        },
    ),
    "counts": _object(
        "The number of findings.",
        {
            "errors": _count("Findings of severity error."),
            "warnings": _count("Findings of severity warning."),
            "notes": _count("Findings of severity note."),
            "ignored": _count("Findings that were left out by --ignore."),
        },
    ),
    "coverage": _object(
        "How much of one module was loaded.",
        {
            "module": _text("The name of the module, or of a tensor that is in no such module."),
            "loaded": _count("The number of loaded tensors."),
            "tensors": _count("The number of all tensors."),
            "loaded_elements": _count("The number of loaded elements."),
            "elements": _count("The number of all elements."),
        },
    ),
    "operation": {
        **_table("A tensor operation: its name, and its parameters.", _table("The parameters.", _any("A value."))),
        "minProperties": 1,
        "maxProperties": 1,
    },
    "rule": _object(
        "A suggested rule.",
        {
            "from": _texts("The patterns of the found keys."),
            "to": _texts("The patterns of the expected keys."),
            "op": _OPERATIONS,
            "tensors": _count("The number of tensors that the rule explains."),
            "elements": _count("The number of their elements."),
            "confidence": _share("The confidence."),
            "why": _text("The evidence, in words."),
        },
    ),
    "numbers": _object("Statistics of values.", _NUMBERS),
    "parameter": _object(
        "A parameter of a model.",
        {
            "key": _text("The name of the parameter."),
            "shape": _ref("shape", "The shape."),
            "elements": _count("The number of elements."),
            "aliases": _TIES,
            "rule": _text("The rule of the spec that owns it; empty where none does."),
            "modifiers": _MODIFIERS,
            "layer": _LAYER,
        },
    ),
    "locked_parameter": _object(
        "A parameter as it was locked.",
        {
            "name": _text("The name of the parameter, without what wrappers put before it."),
            "index": _count_or_null("Its position in the state_dict of the optimizer; null if it is in no group."),
            "shape": _ref("shape", "The shape."),
            "dtype": _text("The dtype by its code in safetensors; empty where it is not known."),
            "aliases": _TIES,
            "rule": _text("The rule of the spec that owns it; empty if the lock was made from a live optimizer."),
            "modifiers": _MODIFIERS,
            "layer": _LAYER,
        },
    ),
    "package": _object(
        "A package that ckptkit or one of its extras needs.",
        {
            "name": _text("The name of the distribution."),
            "version": _text_or_null("The installed version, or null."),
            "lowest": _text_or_null("The lowest version that works, or null if every version does."),
            "problem": {"description": "What is wrong with it, or null.", "enum": ["missing", "too old", None]},
        },
    ),
    "slot": {
        "description": "A value of the state of a parameter: a tensor, or any other value.",
        "oneOf": [
            _object(
                "A tensor.",
                {"name": _text("The name, such as exp_avg."), **_LOOKS, "bytes": _count("The number of bytes.")},
            ),
            _object("A value.", {"name": _text("The name, such as step."), "value": _any("The value.")}),
        ],
    },
    "plan_source": _object(
        "A tensor that is read.",
        {"role": _text("The input, such as source, base or donor."), "key": _KEY, **_LOOKS},
    ),
    "recipe": _object(
        "How tensors are computed: the operations on the inputs, and which of the results is meant.",
        {
            "inputs": _list(
                "Positions in the sources of the step, or recipes.",
                {"anyOf": [{"type": "integer", "minimum": 0}, {"$ref": "#/$defs/recipe"}]},
            ),
            "operations": _OPERATIONS,
            "part": _count("The position of the result, where the operations make several tensors."),
        },
    ),
}


def _schema(
    name: str, command: str, about: str, fields: Mapping[str, Schema], optional: tuple[str, ...] = ()
) -> tuple[str, Schema]:
    """Return the name of a schema and its text, with the definitions that it uses."""
    tag: Schema = {"description": "The name and the version of this schema.", "const": f"ckptkit.{name}/1"}
    body = _object(about, {"schema": tag, **fields}, optional)
    used: set[str] = set()
    _collect(body, used)
    schema: Schema = {"$schema": _DIALECT, "title": command, **body}
    if used:
        schema["$defs"] = {definition: text for definition, text in _DEFINITIONS.items() if definition in used}
    return name, schema


def _collect(schema: object, used: set[str]) -> None:
    """Add the names of the definitions that a schema refers to, also through other definitions."""
    for name in _references(schema):
        if name not in used:
            used.add(name)
            _collect(_DEFINITIONS[name], used)


def _references(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix("#/$defs/")
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _edit(command: str, about: str) -> tuple[str, Schema]:
    """Return the schema of a command that writes a checkpoint."""
    output = _object(
        "What was written.",
        {
            "path": _text("The path of the output."),
            "format": _text("The format of the output."),
            "tensors": _count("The number of tensors."),
            "bytes": _count("The number of bytes of all tensors."),
            "shared_bytes": _count("How many of them are in blocks of the disk that an input has too (reflink)."),
            "kept_shards": _count("The number of shards that an earlier run had finished, and that --continue kept."),
            "verified": _text_or_null("The reader that found the planned bytes with --verify; null without --verify."),
            "read_back": _text_or_null("Why other readers refuse the output, so that ckptkit read it; else null."),
            "cast_losses": _list(
                "The tensors in which a cast changed values by more than rounding.",
                _object(
                    "The losses of one tensor.",
                    {
                        "key": _KEY,
                        "found": _ref("dtype", "The dtype before the cast."),
                        "dtype": _ref("dtype", "The dtype after the cast."),
                        "values": _count("The number of values."),
                        "overflowed": _count("How many were too large for the new dtype."),
                        "underflowed": _count("How many became 0."),
                        "truncated": _count("How many lost a fraction."),
                        "infinite_codes": _count("How many codes of a quantised weight stand for NaN or inf."),
                    },
                ),
            ),
            "extracted": _list(
                "The weights whose change was factored with --method extract-lora.",
                _object(
                    "How much of one change the factors hold.",
                    {
                        "key": _KEY,
                        "change": _number("The norm of the change."),
                        "left_out": _number("The norm of what the factors leave out."),
                    },
                ),
            ),
            "merged": _list(
                "The merged tensors of which their method found more than the plan could say.",
                _object(
                    "What was found of one tensor.",
                    {
                        "key": _KEY,
                        "warning": _text_or_null("What the user should know, such as that the inputs are opposite."),
                        "numbers": _table("Numbers that the method found by itself, by name.", _number("The number.")),
                    },
                ),
            ),
            "carried": _texts("The names of the files that --carry copied."),
            "adapted": _list(
                "The statements in carried files that were changed to what the output holds.",
                _object(
                    "One change.",
                    {
                        "file": _text("The name of the file."),
                        "statement": _text("The path of the statement, such as text_config.dtype."),
                        "found": _any("The old value."),
                        "written": _any("The new value; null if the statement was removed."),
                    },
                ),
            ),
        },
    )
    fields = {
        "plan": _list(
            "The tensors of the output, in order.",
            _object(
                "One tensor of the output.",
                {
                    "key": _KEY,
                    **_LOOKS,
                    "sources": _list(
                        "The tensors that it is made from, and those that are proved equal to it.",
                        _object(
                            "One tensor of an input.",
                            {"role": _text("The input, such as source, base or donor."), "key": _KEY},
                        ),
                    ),
                    "operation": _text("The operation: copy, cast, or the names of tensor operations."),
                    "rule": _text_or_null("The rule that named it, or null."),
                    "merge": {
                        "description": "How a method of ckpt merge computes it; null if none does.",
                        "anyOf": [
                            _object(
                                "The merge of one tensor.",
                                {
                                    "method": _text("The method."),
                                    "base": _text_or_null("The role of its base, or null."),
                                    "inputs": _texts("The roles of the inputs that it merges, without the base."),
                                    "parameters": _table(
                                        "The value of each parameter of the method, by name.",
                                        _any("The value; of a parameter for each input, the values in their order."),
                                    ),
                                },
                            ),
                            {"type": "null"},
                        ],
                    },
                },
            ),
        ),
        "dropped": _list(
            "What is not in the output.",
            _object(
                "A tensor or another entry that is left out.",
                {
                    "role": _text("The input, such as source, base or donor."),
                    "key": _text("The key, or the path of an entry that is not a tensor."),
                    "reason": _text("Why it is left out."),
                },
            ),
        ),
        "kept": _texts("The entries outside of the weights that are copied unchanged."),
        "metadata": _table("The metadata of the output.", {"type": "string"}),
        "summary": _object(
            "Totals of the output.",
            {
                **_TOTALS,
                "dropped": _count("The number of entries that are left out."),
                "coverage": _share_or_null(
                    "The share of the base's elements with values of a donor; null without a base."
                ),
                "from_base": _texts("The keys of the base that get no value from a donor."),
                "by_source": _table("The number of tensors from each input.", _count("Tensors.")),
                "by_operation": _table("The number of tensors that each operation makes.", _count("Tensors.")),
                "by_method": _table("The number of tensors that each method merges.", _count("Tensors.")),
            },
        ),
        "output": {"description": "What was written; null for a dry run.", "anyOf": [output, {"type": "null"}]},
    }
    return _schema(command, f"ckpt {command} --json", about, fields)


SCHEMAS: dict[str, Schema] = dict(
    (
        _schema(
            "show",
            "ckpt show --json",
            "The content of a checkpoint. Also Checkpoint.to_dict().",
            {
                "path": _PATH,
                "format": _FORMAT,
                "tensors": _list(
                    "The tensors, in the order of the checkpoint.",
                    _object(
                        "A tensor.",
                        {
                            "key": _KEY,
                            **_LOOKS,
                            "elements": _count("The number of elements."),
                            "bytes": _count("The number of bytes."),
                            "shared_with": _texts("The keys that share its memory, at most 64."),
                            "digest": _text_or_null("With --digests, ALGORITHM:HEX of the tensor if it was read."),
                        },
                    ),
                ),
                "quantized": _list("The quantised weights.", "quantized"),
                "entries": _list(
                    "What the checkpoint has beside the weights, such as the epoch.",
                    _object(
                        "One entry.",
                        {
                            "path": _text("The path of the entry in the checkpoint."),
                            "type": _text("The type."),
                            "value": _any("The value, or a short description if JSON cannot hold it."),
                            "beside": _flag("Whether it is beside the mapping that was opened, and not inside."),
                        },
                    ),
                ),
                "metadata": _table("The text that the format stores as metadata.", {"type": "string"}),
                "merge": {
                    "description": "What the metadata or a file beside it says about the merge that made it, or null.",
                    "anyOf": [_table("The text, parsed as JSON.", _any("One field.")), {"type": "null"}],
                },
                "delta": {
                    "description": "What a patch of ckpt delta holds; null for every other file.",
                    "anyOf": [
                        _object(
                            "The document of ckpt delta --json.",
                            {
                                "schema": {"description": "Its name and version.", "const": "ckptkit.delta/1"},
                                **_DELTA,
                            },
                        ),
                        {"type": "null"},
                    ],
                },
                "warnings": _texts("What is unusual about the file."),
                "summary": _object("Totals of the listed tensors.", _TOTALS),
            },
        ),
        _schema(
            "show-list",
            "ckpt show --json with several paths",
            "Several checkpoints, one row each.",
            {
                "checkpoints": _list(
                    "The checkpoints, in the order of the paths.",
                    _object(
                        "A checkpoint, or why it cannot be read.",
                        {
                            "path": _PATH,
                            "format": _text_or_null("The format; null if the checkpoint cannot be read."),
                            "envelope": _text_or_null("The mapping inside the file that holds the weights, if any."),
                            **_TOTALS,
                            "dtypes": _table("The number of tensors of each dtype.", {"type": "integer"}),
                            "quantized": _table("The number of quantised weights of each scheme.", {"type": "integer"}),
                            "error": _text_or_null("Why the checkpoint cannot be read."),
                        },
                    ),
                ),
                "summary": _object(
                    "Totals of the checkpoints that can be read.",
                    {
                        "checkpoints": _count("The number of checkpoints."),
                        "unreadable": _count("The number of those that cannot be read."),
                        **_TOTALS,
                    },
                ),
            },
        ),
        _schema(
            "diff",
            "ckpt diff --json",
            "The differences between two state_dicts. Also StateDictDiff.to_dict().",
            {
                "expected": _ref("checkpoint", "What the model wants."),
                "found": _ref("checkpoint", "What would be loaded."),
                "matched": _list(
                    "The tensors that load as they are.",
                    _object(
                        "A tensor.",
                        {
                            "key": _text("The expected key."),
                            "found_key": _text("The key in the found checkpoint, before rules."),
                            **_LOOKS,
                            "by_own_code": _flag("Whether the model's own code loads it from that other key."),
                        },
                    ),
                ),
                "missing": _list("Expected tensors that were not found.", "tensor"),
                "unexpected": _list("Found tensors that are not expected.", "tensor"),
                "shape_mismatched": _list("Tensors with another shape.", "pair"),
                "dtype_mismatched": _list("Tensors with another dtype; torch casts them.", "pair"),
                "computed": _list(
                    "Tensors that the model's own code makes of found tensors.",
                    _object(
                        "A tensor.",
                        {
                            "key": _text("The expected key."),
                            "found_keys": _texts("The found tensors that it is made of, after rules."),
                        },
                    ),
                ),
                "reported": _texts("Further keys that the model's own code reports, or saves where it was not tried."),
                "own_code": {
                    "description": "The model's own code for loading; null without it, or if EXPECTED is not live.",
                    "anyOf": [
                        _object(
                            "What was tried.",
                            {
                                "tried": _flag("Whether it was tried on a copy without values; if not, names decided."),
                                "reason": _text_or_null("Why it was not tried, or null."),
                                "refusals": _texts("What it says where it refuses the checkpoint."),
                                "not_reported": _texts("Missing and unexpected keys that load_state_dict accepts."),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
                "quantized": _list(
                    "Weights that are quantised on one side only, or in two ways.",
                    _object(
                        "A weight.",
                        {
                            "key": _text("The expected key of the weight."),
                            "scheme": _text("The quantisation scheme."),
                            "side": _one_of("The side with the quantised weight.", "expected", "found", "both"),
                            "parts": _texts("The keys of its parts."),
                        },
                    ),
                ),
                "dequantized": _list(
                    "The quantised weights that were compared as numbers.",
                    _object(
                        "A weight.",
                        {
                            "side": _one_of("The side that has it.", "expected", "found"),
                            "key": _text("The key of the weight, before rules."),
                            "scheme": _text("The quantisation scheme."),
                            "dtype": _text("The dtype of the numbers."),
                        },
                    ),
                ),
                "values": {
                    "description": "The comparison of values; null where they were not compared.",
                    "anyOf": [_ref("values", "The comparison of values."), {"type": "null"}],
                },
                "unmet": _list("The requirements that are not met; the exit code is then 1.", "unmet"),
                "hints": _list(
                    "What would explain differences.",
                    _object(
                        "A hint.",
                        {
                            "message": _text("The hint, in one sentence."),
                            "rename": _text_or_null("The value of --rename that makes more keys match, or null."),
                        },
                    ),
                ),
                "summary": _object(
                    "Counts, and the verdict.",
                    {
                        "matched": _count("The length of matched."),
                        "missing": _count("The length of missing."),
                        "unexpected": _count("The length of unexpected."),
                        "shape_mismatched": _count("The length of shape_mismatched."),
                        "dtype_mismatched": _count("The length of dtype_mismatched."),
                        "quantized": _count("The length of quantized."),
                        "computed": _count("The length of computed."),
                        "same_ranges": _count("Matched tensors whose bytes are one range of one file on both sides."),
                        "coverage": _share("The share of expected elements that would be loaded."),
                        "loads_strict": _flag("Whether load_state_dict(strict=True) accepts the checkpoint."),
                        "loads": _flag("Whether load_state_dict(strict=False) accepts the checkpoint."),
                        "different": _flag("Whether there is any difference; the exit code is then 1."),
                    },
                ),
            },
        ),
        _schema(
            "values",
            "compare_values(...).to_dict()",
            "The values that differ between two checkpoints. ckpt diff --values --json has them in its document.",
            _VALUES,
        ),
        _edit("merge", "A merge, or with --dry-run its plan. Also the to_dict() of its Plan and its Written."),
        _edit("remap", "A remap, or with --dry-run its plan. Also the to_dict() of its Plan and its Written."),
        _edit("convert", "A conversion, or with --dry-run its plan. Also the to_dict() of its Plan and its Written."),
        _edit("apply", "A patch that was applied, or its plan. Also the to_dict() of its Plan and its Written."),
        _schema("delta", "ckpt delta --json", "What a patch holds, or would hold. Also Delta.to_dict().", _DELTA),
        _schema(
            "stats",
            "ckpt stats --json",
            "Statistics of values. Also StateDictStats.to_dict().",
            {
                "path": _PATH,
                "format": _FORMAT,
                "tensors": _list(
                    "The measured tensors; --sort and --top choose them.",
                    _object(
                        "A tensor.",
                        {
                            "key": _KEY,
                            **_LOOKS,
                            "same_as": _text_or_null("The key of an earlier tensor in the same memory, or null."),
                            **_NUMBERS,
                        },
                    ),
                ),
                "modules": _list(
                    "The modules with --depth, else empty.",
                    _object("A module.", {"module": _text("The name of the module."), **_NUMBERS}),
                ),
                "not_judged": _list(
                    "The tensors that were not measured.",
                    _object("A tensor.", {"key": _KEY, **_LOOKS, "reason": _text("Why it was not measured.")}),
                ),
                "quantized": _list("The quantised weights; their parts are not measured.", "quantized"),
                "dequantized": _list(
                    "The quantised weights that were measured as numbers.",
                    _object(
                        "A weight.",
                        {
                            "key": _text("The key of the weight, before rules."),
                            "scheme": _text("The quantisation scheme."),
                            "dtype": _text("The dtype of the numbers."),
                        },
                    ),
                ),
                "total": _ref("numbers", "The statistics of all measured tensors; tied tensors count once."),
                "summary": _object("Totals of the checkpoint.", _TOTALS),
            },
        ),
        _schema(
            "digest",
            "ckpt digest --json",
            "Digests of tensors. Also Digests.to_dict().",
            {
                "checkpoint": _ref("checkpoint", "The checkpoint, with the totals of the tensors that are listed."),
                "algorithm": _one_of("The hash.", "sha256", "xxh3"),
                "tensors": _list(
                    "The tensors, sorted by key.",
                    _object("A tensor.", {"key": _KEY, **_LOOKS, "digest": _text("ALGORITHM:HEX of the tensor.")}),
                ),
                "skipped": _SKIPPED,
                "contents": _text("ALGORITHM:HEX of all keys and digests."),
                "names_and_shapes": _text("ALGORITHM:HEX of all keys and shapes."),
            },
        ),
        _schema(
            "digest-check",
            "ckpt digest --check --json",
            "The check of a checkpoint against recorded digests. Also DigestCheck.to_dict().",
            {
                "checkpoint": _ref("checkpoint", "The checkpoint that was read."),
                "algorithm": _one_of("The hash.", "sha256", "xxh3"),
                "equal": _texts("Keys with the recorded digest."),
                "different": _texts("Keys with another digest."),
                "missing": _list(
                    "Recorded keys that the checkpoint does not have.",
                    _object(
                        "A key.",
                        {"key": _KEY, "moved_to": _text_or_null("A new key with the recorded digest, or null.")},
                    ),
                ),
                "new": _texts("Keys that were not recorded."),
                "skipped": _SKIPPED,
                "contents": _flag("Whether keys and digests are the recorded ones."),
                "names_and_shapes": {
                    "description": "Whether keys and shapes are the recorded ones; null where that is not known, since "
                    "recorded keys were left out. The exit code is 0 if contents is true and this is not false.",
                    "type": ["boolean", "null"],
                },
                "left_out": _texts("Recorded keys that the rules leave out: they were not compared."),
            },
        ),
        _schema(
            "check",
            "ckpt check --json, and ckpt groups validate, ckpt groups diff and ckpt optim diff with --json",
            "Findings. Also the to_dict() of a Report and of a CheckReport.",
            _FINDINGS,
        ),
        _schema(
            "align",
            "ckpt align --json",
            "Suggested rules. Also Alignment.to_dict().",
            {
                "expected": _ref("checkpoint", "What the model wants."),
                "found": _ref("checkpoint", "What would be renamed."),
                "rules": _list("The suggested rules.", "rule"),
                "ambiguous": _list(
                    "Tensors that could be several others.",
                    _object(
                        "Expected tensors, and the found tensors that they could be.",
                        {
                            "expected": _list("The expected tensors.", "tensor"),
                            "found": _list("The found tensors.", "tensor"),
                            "why": _text("Why they cannot be told apart."),
                            "candidates": _list("The possible rules.", "rule"),
                        },
                    ),
                ),
                "shape_mismatched": _list(
                    "Tensors that have their name in common, and another shape.",
                    _object(
                        "A pair.",
                        {"expected": _ref("tensor", "The expected one."), "found": _ref("tensor", "The found one.")},
                    ),
                ),
                "missing": _list("Expected tensors without a found tensor.", "tensor"),
                "unexpected": _list("Found tensors without an expected tensor.", "tensor"),
                "presets": _texts("The presets of rules that explain all expected tensors."),
                "different": _texts("With digests, the expected keys that are filled with other bytes."),
                "hints": _texts("What decides where tensors are ambiguous, with the options of the command."),
                "summary": _object(
                    "Counts, and whether all is explained.",
                    {
                        "tensors": _count("The number of expected tensors."),
                        "same": _count("How many have the same name on both sides."),
                        "renamed": _count("How many the rules explain."),
                        "ambiguous": _count("How many are ambiguous."),
                        "missing": _count("The length of missing."),
                        "unexpected": _count("The length of unexpected."),
                        "equal": _count_or_null("With digests, how many are filled with equal bytes."),
                        "different": _count_or_null("With digests, how many are filled with other bytes."),
                        "share": _share("The share of expected elements that is explained, without different bytes."),
                        "complete": _flag("Whether every expected tensor is explained, and none is different."),
                    },
                ),
            },
        ),
        _schema(
            "preflight",
            "ckpt preflight --json",
            "The checks before training. Also Preflight.to_dict(). A section is null or empty without its option.",
            {
                "verdict": _text("ready, or ready with warnings, or not ready with the reason."),
                **_FINDINGS,
                "init": {
                    "description": "What --init fills, or null.",
                    "anyOf": [
                        _object(
                            "The initial checkpoint.",
                            {
                                "loaded": _count("The number of tensors that it fills."),
                                "tensors": _count("The number of tensors of the model."),
                                "loaded_elements": _count("The number of elements that it fills."),
                                "elements": _count("The number of elements of the model."),
                                "coverage": _share("loaded_elements of elements."),
                                "in_model": _one_of(
                                    "How many of these tensors have the values of the checkpoint already.",
                                    "all",
                                    "part",
                                    "none",
                                    "unknown",
                                ),
                                "modules": _list("The coverage by module.", "coverage"),
                                "kept": _list(
                                    "The tensors that stay at init.",
                                    _object(
                                        "A tensor.",
                                        {
                                            "key": _KEY,
                                            "why": _text("Why it is not filled."),
                                            "elements": _count("The number of elements."),
                                            "looks": _text("What its values look like; empty if not judged."),
                                        },
                                    ),
                                ),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
                "training": _list(
                    "What trains, by module.",
                    _object(
                        "A module, or a parameter outside of modules.",
                        {
                            "module": _text("The name."),
                            "trainable": _count("The number of parameters that train."),
                            "parameters": _count("The number of parameters."),
                            "trainable_elements": _count("The number of elements that train."),
                            "elements": _count("The number of elements."),
                        },
                    ),
                ),
                "groups": _list(
                    "The param groups.",
                    _object(
                        "A group.",
                        {
                            "name": _text("The name of the group."),
                            "optimizer": _text("The class of its optimizer; empty where it is not known."),
                            "parameters": _texts("The names in order; empty for a tensor that is not in the model."),
                            "elements": _count("The number of elements."),
                            "options": _OPTIONS,
                        },
                    ),
                ),
                "memory": {
                    "description": "The memory of training without activations, or null.",
                    "anyOf": [
                        _object(
                            "Sizes in bytes.",
                            {
                                "parameters": _count("Of the parameters."),
                                "buffers": _count("Of the buffers."),
                                "gradients": _count("Of the gradients."),
                                "states": _list(
                                    "Of the optimizer states.",
                                    _object(
                                        "The state of one optimizer after its first step.",
                                        {
                                            "optimizer": _text("The class of the optimizer."),
                                            "slots": _texts("The slots of a parameter."),
                                            "bytes": _count_or_null("The size; null if the class is not known."),
                                        },
                                    ),
                                ),
                                "total": _count("The sum of all known sizes."),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
                "resume": {
                    "description": "How far the run of --resume fits, or null.",
                    "anyOf": [
                        _object(
                            "The run.",
                            {
                                "matched": _count("The number of keys of the model that the run has."),
                                "expected": _count("The number of keys of the model."),
                                "positions": _count_or_null(
                                    "The number of parameters in its optimizer state; null without one, or without "
                                    "groups."
                                ),
                                "with_state": _count("The number of parameters that have state."),
                                "form": _text("The form of the optimizer state; empty without one."),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
                "step": {
                    "description": "The dry step on a copy of the model, or null.",
                    "anyOf": [
                        _object(
                            "The step.",
                            {
                                "loss": _number("The loss; null if there was none."),
                                "optimizer": _text("The class of the optimizer; empty if there was none."),
                                "trainable": _count("The number of parameters that train."),
                                "gradients": _count("How many of them got a gradient."),
                                "moved": _count("How many of them changed."),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
                "not_judged": _texts("The checks that were not made, and why."),
            },
        ),
        _schema(
            "git-install",
            "ckpt git install --json, and ckpt git uninstall --json",
            "What was changed, or would be, so that git diff compares checkpoints.",
            {
                "changes": _list("What is changed; empty if there is nothing to change.", _text("A sentence.")),
                "dry_run": _flag("Whether nothing was changed."),
            },
        ),
        _schema(
            "doctor",
            "ckpt doctor --json",
            "The versions that ckpt runs with, and what is missing.",
            {
                "ckptkit": _text_or_null("The version of ckptkit; null if it is not installed."),
                "python": _text("The version of Python."),
                "platform": _text("The operating system and machine."),
                "torch": _object(
                    "What torch can compute on.",
                    {
                        "error": _text_or_null("Why torch cannot be imported, or null."),
                        "devices": _text("The kinds of devices, separated by commas."),
                        "cuda": _text_or_null("The version of CUDA that torch was built for, or null."),
                    },
                ),
                "packages": _list("The packages that ckptkit needs.", "package"),
                "extras": _list(
                    "The optional packages.",
                    _object(
                        "An extra.",
                        {"name": _text("The name of the extra."), "packages": _list("Its packages.", "package")},
                    ),
                ),
                "problems": _texts("What keeps ckpt from working, one sentence each; the exit code is then 1."),
            },
        ),
        _schema(
            "groups",
            "ckpt groups table --json",
            "The param groups of a model. Also ParamGroupsPlan.to_dict().",
            {
                "groups": _list(
                    "The groups, in the order of the optimizer.",
                    _object(
                        "A group.",
                        {
                            "name": _text("The name of the group."),
                            "params": _texts("The patterns of its rule."),
                            "rest": _flag("Whether its rule owns all that no earlier rule owns."),
                            "rule": _text("The name of its rule."),
                            "match": {
                                "description": "The condition of its rule, as in a spec, or null.",
                                "type": ["object", "null"],
                            },
                            "optimizer": _text_or_null("The class that the spec names for it, or null."),
                            "modifiers": _MODIFIERS,
                            "options": _OPTIONS,
                            "elements": _count("The number of elements."),
                            "parameters": _list("Its parameters, in order.", "parameter"),
                        },
                    ),
                ),
                "frozen": _list("The parameters that the model froze; no group has them.", "parameter"),
                "freeze": _list("The parameters that the spec freezes; no group has them.", "parameter"),
                "idle": _texts("The optional rules that own nothing."),
                "summary": _object(
                    "Counts.",
                    {
                        "groups": _count("The number of groups."),
                        "parameters": _count("The number of parameters in groups."),
                        "elements": _count("The number of their elements."),
                        "frozen_parameters": _count("The length of frozen."),
                        "frozen_elements": _count("The number of their elements."),
                    },
                ),
            },
        ),
        _schema(
            "groups-explain",
            "ckpt groups explain --json",
            "Why a parameter trains as it does. Also Explanation.to_dict().",
            {
                "key": _text("The name of the parameter."),
                "aliases": _TIES,
                "dtype": _text("The dtype by its code in safetensors; empty where it is not known."),
                "shape": _ref_or_null("shape", "The shape; null if the parameter is not initialised."),
                "roles": _texts("What the parameter is: bias, norm, embedding and so on."),
                "outcome": _one_of(
                    "trained; frozen by the model; freeze, by the spec; or unowned: no rule owns it.",
                    "trained",
                    "frozen",
                    "freeze",
                    "unowned",
                ),
                "rule": _text_or_null("The rule that owns it, or null."),
                "shadowed": _texts("Later rules that match it too."),
                "modifiers": _MODIFIERS,
                "layer": _LAYER,
                "steps": _list(
                    "The steps to its options, in order.",
                    _object(
                        "One step.",
                        {
                            "who": _text("defaults, or the name of the rule or the modifier."),
                            "option": _text("The name of the option."),
                            "value": _any("The value after this step."),
                            "factor": {
                                "description": "The number that the option was multiplied by; null if it was set.",
                                "type": ["number", "null"],
                            },
                        },
                    ),
                ),
                "options": {
                    "description": "The options in the end; null for a parameter in no group.",
                    "anyOf": [_OPTIONS, {"type": "null"}],
                },
            },
        ),
        _schema(
            "groups-emit",
            "ckpt groups emit --json",
            "A spec of param groups. ParamGroupSpec.to_dict() is the field spec alone.",
            {
                "as": _one_of("The language of text.", "toml", "json", "python"),
                "spec": {"description": "The spec, which every command and function takes.", "type": "object"},
                "text": _text("The spec in that language."),
            },
        ),
        _schema(
            "groups-lock",
            "ckpt groups lock --json, and the lock file",
            "The param groups of a run. Also ParamGroupsLock.to_dict().",
            {
                "fingerprint": {
                    "description": "SHA-256 over name, dtype, shape and ties of every parameter, sorted by name.",
                    "type": "string",
                    "pattern": "^sha256:[0-9a-f]{64}$",
                },
                "groups": _list(
                    "The groups, in the order of the optimizer.",
                    _object(
                        "A group.",
                        {
                            "name": _text("The name of the group."),
                            "optimizer": _text_or_null("The class of its optimizer, or null."),
                            "options": _OPTIONS,
                            "parameters": _list("Its parameters, in order.", "locked_parameter"),
                        },
                    ),
                ),
                "outside": _list("The parameters in no group, such as frozen ones.", "locked_parameter"),
            },
        ),
        _schema(
            "optim",
            "ckpt optim show, remap, resplit and prune with --json",
            "An optimizer state by parameter name. Also OptimizerState.to_dict().",
            {
                "path": _text("The path of the checkpoint; empty for a live state."),
                "at": _text("The mapping inside the checkpoint; empty if it is the whole file."),
                "form": _one_of("The form of the state.", "indexed", "param-names", "named", "flattened"),
                "evidence": _text_or_null("How the names were found; null if the state has names."),
                "remarks": _texts("Further messages about the state."),
                "parameters": _list(
                    "The parameters.",
                    _object(
                        "A parameter.",
                        {
                            "key": _text("The name of the parameter."),
                            "group": _count_or_null("The position of its group; null if it is in no group."),
                            "shape": _ref_or_null("shape", "The shape; null where its state does not tell."),
                            "step": _number("The step count, or null."),
                            "slots": _list("Its state.", "slot"),
                        },
                    ),
                ),
                "groups": _list(
                    "The groups.",
                    _object(
                        "A group.",
                        {"parameters": _count("The number of parameters."), "options": _OPTIONS},
                    ),
                ),
                "changes": _list(
                    "What the command did to each parameter; empty for show.",
                    _object(
                        "A change.",
                        {
                            "key": _text("The name of the parameter."),
                            "sources": _texts("The names of the parameters that its state was made from."),
                            "operation": _text("copy, dropped, reset, new, or the names of tensor operations."),
                            "reason": _text_or_null("The rule, or why state was removed; null where nothing is said."),
                        },
                    ),
                ),
                "findings": {
                    "description": "What is unusual, for show; else null.",
                    "anyOf": [_FINDINGS["findings"], {"type": "null"}],
                },
                "summary": _object(
                    "Counts. Those of findings are there for show only.",
                    {
                        "parameters": _count("The number of parameters."),
                        "groups": _count("The number of groups."),
                        "with_state": _count("The number of parameters with state."),
                        "tensors": _count("The number of tensors of state."),
                        "bytes": _count("The number of their bytes."),
                        "errors": _count("Findings of severity error."),
                        "warnings": _count("Findings of severity warning."),
                        "notes": _count("Findings of severity note."),
                    },
                    optional=("errors", "warnings", "notes"),
                ),
                "output": {
                    "description": "What was written; null for show and for a dry run.",
                    "anyOf": [
                        _object(
                            "The output.",
                            {
                                "path": _text("The path of the output."),
                                "at": _text("The mapping inside the file that has the state; empty if it is all."),
                                "bytes": _count("The number of bytes of all tensors of state."),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
            },
        ),
        _schema(
            "load",
            "LoadReport.to_dict()",
            "What load_into loaded into a model.",
            {
                "loaded": _texts("The keys that were loaded."),
                "kept": _texts("The keys of the model that were left as they were."),
                "coverage": _share("The share of the elements of the model that were loaded."),
                "modules": _list("The coverage by module.", "coverage"),
                **_FINDINGS,
            },
        ),
        _schema(
            "optim-load",
            "OptimizerLoadReport.to_dict()",
            "What load_optimizer_state loaded into an optimizer.",
            {
                "loaded": _texts("The parameters that got state from the file."),
                "reshaped": _texts("The parameters whose state was made by rules from that of others."),
                "dropped": _texts("The parameters whose state in the file does not fit."),
                "missing": _texts("The parameters that the file has no state for."),
                "unused": _texts("The parameters with state in the file that the optimizer does not have."),
                **_FINDINGS,
            },
        ),
        _schema(
            "plan",
            "The file of --plan, which ckpt remap takes with --apply and --invert",
            "A plan. The file is read only if every field has its type.",
            {
                "sources": _table(
                    "The inputs by role.",
                    _object(
                        "An input.",
                        {
                            "path": _PATH,
                            "format": _FORMAT,
                            "tensors": _count("The number of tensors."),
                            "header": {
                                "description": "SHA-256 of the keys, dtypes and shapes.",
                                "type": "string",
                                "pattern": "^sha256:[0-9a-f]{64}$",
                            },
                        },
                    ),
                ),
                "plan": _list(
                    "The tensors of the output, in order.",
                    _object(
                        "One tensor of the output.",
                        {
                            "key": _KEY,
                            **_LOOKS,
                            "sources": _list("The tensors that it is made from.", "plan_source"),
                            "operation": _text("The operation: copy, cast, or the names of tensor operations."),
                            "rule": _text("The rule that named it; empty without one."),
                            "recipe": _ref_or_null("recipe", "How it is computed; null for a copy."),
                            "equals": _list("The tensors that are proved equal to it.", "plan_source"),
                        },
                    ),
                ),
                "dropped": _list(
                    "What is not in the output.",
                    _object(
                        "A tensor or another entry that is left out.",
                        {
                            "role": _text("The input."),
                            "key": _text("The key, or the path of an entry."),
                            "reason": _text("Why it is left out."),
                            "wanted": _text(
                                "The key of the base that it would have filled but for its shape; else empty."
                            ),
                            "entry": _flag("Whether it is an entry outside of the weights."),
                        },
                    ),
                ),
                "metadata": _table("The metadata of the output.", {"type": "string"}),
                "versions": _table("The module versions of the state_dict, by module.", _count("A version.")),
                "notes": _texts("Messages about the plan."),
                "keeps": _text("The role of the input whose other entries are kept; empty if none are."),
                "kept": _texts("The entries outside of the weights that are copied unchanged."),
                "patched_base": {
                    "description": "The base of a patch; null where the plan applies none.",
                    "anyOf": [
                        _object(
                            "The base.",
                            {
                                "name": _text("The name of the base that the patch was made from; it may be empty."),
                                "digests": _table(
                                    "SHA-256 of tensors that no step compares, by key.", _text("Digits.")
                                ),
                            },
                        ),
                        {"type": "null"},
                    ],
                },
            },
        ),
    )
)
