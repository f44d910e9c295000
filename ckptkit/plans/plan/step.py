"""One tensor of an output and its sources, and the entries that an output leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ckptkit.core.arguments import refuse, require_type
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.frozen import slot_setters
from ckptkit.core.text import plural, quoted
from ckptkit.errors import ArgumentError

if TYPE_CHECKING:
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["PATCH_OPERATION", "Dropped", "Source", "Step"]

PATCH_OPERATION: Final = "patch"  # the name of the operation that makes a tensor of a base and a patch


@dataclass(frozen=True, slots=True, init=False)
class Source:
    """One tensor of an input: the role of the input (``base``, ``donor``, ``source``) and the tensor's key in it."""

    role: str
    key: str

    def __init__(self, role: str, key: str) -> None:
        """Set the fields; refuse a role or a key that is not a str."""
        if type(role) is not str or type(key) is not str:
            for name, value in (("role", role), ("key", key)):
                require_type(value, str, f"the {name} of a source", "a str")
        _set_role(self, role)
        _set_key(self, key)


_set_role, _set_key = slot_setters(Source)


@dataclass(frozen=True, slots=True, init=False)
class Step:
    """One tensor of the output, with its sources, the operations on them and the rule that asked for it.

    Without a ``recipe`` the tensor is a copy or a cast of its only source. A ``recipe`` computes the tensor from its
    sources, and a cast follows where the dtypes differ. ``equals`` names tensors that must have the same bytes as the
    first source; ``execute`` compares them. ``tied_to`` is the key of the output that the base ties this key to.
    """

    out: TensorInfo
    sources: tuple[Source, ...]
    operation: str = "copy"
    rule: str = ""
    recipe: Recipe | None = None
    equals: tuple[Source, ...] = ()
    is_cast: bool = False  # whether the last operation is a cast
    tied_to: str | None = None  # a plan file does not record it

    def __init__(  # noqa: PLR0917 - the fields of the dataclass, in its order
        self,
        out: TensorInfo,
        sources: tuple[Source, ...],
        operation: str = "copy",
        rule: str = "",
        recipe: Recipe | None = None,
        equals: tuple[Source, ...] = (),
        is_cast: bool = False,
        tied_to: str | None = None,
    ) -> None:
        """Set all fields through their slots; refuse one of a wrong type, which ``dataclasses.replace`` could set."""
        _set_out(self, out)
        _set_sources(self, sources)
        _set_operation(self, operation)
        _set_rule(self, rule)
        _set_recipe(self, recipe)
        _set_equals(self, equals)
        _set_is_cast(self, is_cast)
        _set_tied_to(self, tied_to)
        is_plain = recipe is None and equals == () and type(out) is TensorInfo and type(out.key) is str
        is_plain = is_plain and type(sources) is tuple and len(sources) == 1 and type(sources[0]) is Source
        if not is_plain or type(operation) is not str or type(rule) is not str:
            self._refuse_wrong_fields()

    def _refuse_wrong_fields(self) -> None:
        self._refuse_wrong_types()
        count = len(self.sources)
        if not count or (count > 1 if self.recipe is None else self.recipe.end > count):
            needs = "one source" if self.recipe is None else plural(max(self.recipe.end, 1), "source")
            raise ArgumentError(f"{quoted(self.out.key)} has {plural(count, 'source')}", hint=f"its step needs {needs}")

    def _refuse_wrong_types(self) -> None:
        require_type(self.out, TensorInfo, "out", "a TensorInfo")
        require_type(self.out.key, str, "the key of out", "a str")
        for name in ("sources", "equals"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not set(map(type, given)) <= {Source}:
                refuse(given, name, "a tuple of Source")
        if (type(self.operation), type(self.rule)) != (str, str):
            for name in ("operation", "rule"):
                require_type(getattr(self, name), str, name, "a str")
        if self.recipe is not None and not hasattr(self.recipe, "operations"):
            refuse(self.recipe, "recipe", "a Recipe, or None")

    @property
    def is_copy(self) -> bool:
        """Whether the tensor has the bytes of its source."""
        return self.recipe is None and not self.is_cast

    @property
    def is_patched(self) -> bool:
        """Whether the tensor is made of a base and a patch, and has a digest that is known."""
        return self.recipe is not None and self.recipe.operations[-1].name == PATCH_OPERATION


_set_out, _set_sources, _set_operation, _set_rule, _set_recipe, _set_equals, _set_is_cast, _set_tied_to = slot_setters(
    Step
)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor or another entry of an input that the output leaves out, and the reason.

    If the shape is the reason, ``wanted`` is the key of the base that the tensor would have filled. In a merge by a
    method, it is the key of the output that is made without the tensor. ``is_entry`` is true for an entry that is not a
    tensor.
    """

    role: str
    key: str
    reason: str
    wanted: str = ""
    is_entry: bool = False
