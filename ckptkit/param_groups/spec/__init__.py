"""The param-group spec: which parameter trains with which options; each change of a spec makes a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.core.arguments import refuse, require_flags
from ckptkit.core.result import Result
from ckptkit.core.text import plural
from ckptkit.inputs import CheckpointLike
from ckptkit.param_groups.spec.checks import checked
from ckptkit.param_groups.spec.combining import combined_fields
from ckptkit.param_groups.spec.fields import SpecFields
from ckptkit.param_groups.spec.tables import parse_group, parse_modifier
from ckptkit.param_groups.spec.writing import dump_spec, spec_table

__all__ = ["ParamGroupSpec"]


@dataclass(frozen=True, slots=True, repr=False)
class ParamGroupSpec(SpecFields, Result):
    """The rules that decide the group of each parameter, and the options of each group.

    - ``rules`` are ordered: the first rule that matches a parameter owns it.
    - ``defaults`` are the options of every group; ``optimizers`` has more of them for one optimizer class.
    - ``modifiers`` then change options, in order.
    - ``optimizer`` is the class of every rule that names none.
    - ``unmatched``, ``overlap``, ``frozen``, ``tied``, ``merge`` and ``order`` are policies: see ``POLICIES``.
      ``unmatched`` may also be the name of the rule that owns every parameter that no rule matches.
    - With ``lr_scale``, a group keeps its ``lr`` and has the product of its multiples as ``lr_scale``, for a
      scheduler that reads it.
    - ``ignore`` lists expected findings as ``CODE`` or ``CODE:KEY-PATTERN``; checks with this spec leave them out.

    A spec never changes: ``with_group``, ``freeze``, ``with_modifier``, ``with_defaults`` and ``combined_with`` return
    a new one, which is checked at once.

    Example:
        >>> import torch
        >>> from ckptkit import build_param_groups, param_group_preset
        >>> model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 3), "fc": torch.nn.Linear(3, 2)})
        >>> spec = param_group_preset("no-decay", lr=0.01).with_group("head", "fc.*", lr_mult=10).freeze("body.bias")
        >>> for group in build_param_groups(model, spec):
        ...     print(group["name"], group["param_names"], group["lr"], group["weight_decay"])
        head ['fc.weight'] 0.1 0.01
        head/no decay ['fc.bias'] 0.1 0.0
        base ['body.weight'] 0.01 0.01
    """

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return f"{plural(len(self.rules), 'group')}, {plural(len(self.modifiers), 'modifier')}"

    def with_group(
        self,
        name: str,
        params: str | Sequence[str] | None = None,
        *,
        match: Mapping[str, Any] | None = None,
        optional: bool = False,
        optimizer: str | None = None,
        **options: Any,
    ) -> ParamGroupSpec:
        """Return a spec with one more group, which comes first and so owns all parameters that it matches.

        Another group may lose all its parameters to the new one: in a spec file this is ``override = true``.

        ``params`` is a pattern or a list of patterns, and ``match`` a table of conditions as in a spec file; where
        both are given, both must hold. ``options`` go to the optimizer; ``lr_mult=10`` multiplies the default ``lr``.
        ``optional`` allows that the group owns nothing. ``optimizer`` is the class that trains the group.

        The modifiers of the spec apply to the new group too. The options of the group that owned the parameters do
        not: where other groups set the weight decay, as in the preset ``hf-trainer``, ``with_modifier`` keeps it.

        Raises:
            GroupsError: Another group has the name, or a pattern or an option is wrong.

        Example:
            >>> spec = ckptkit.param_group_preset("no-decay", lr=1e-3).with_group("head", "fc.*", lr_mult=10)
            >>> [rule.name for rule in spec.rules]
            ['head', 'base']
        """
        require_flags(optional=optional)
        table = _table(name, params, match, optional=optional, options=options)
        table |= {} if optimizer is None else {"optimizer": optimizer}
        return self._with_first_group(table)

    def freeze(
        self,
        params: str | Sequence[str] | None = None,
        *,
        match: Mapping[str, Any] | None = None,
        name: str | None = None,
        optional: bool = False,
    ) -> ParamGroupSpec:
        """Return a spec that freezes the parameters that match, whichever group owned them.

        ``params``, ``match`` and ``optional`` mean the same as in ``with_group``. The frozen parameters are the first
        group of the spec; its ``name`` is by default the first pattern. ``build_param_groups`` sets
        ``requires_grad=False`` on the parameters, and no optimizer gets them.

        Raises:
            GroupsError: Another group has the name, or a pattern is wrong.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
            >>> spec = ckptkit.param_group_preset("no-decay").freeze("0.*")
            >>> [group["name"] for group in ckptkit.build_param_groups(model, spec)], model[0].weight.requires_grad
            (['base', 'base/no decay'], False)
        """
        require_flags(optional=optional)
        patterns = [params] if isinstance(params, str) else params if isinstance(params, Sequence) else []
        default = patterns[0] if patterns else "frozen"
        table = _table(default if name is None else name, params, match, optional=optional, options={})
        return self._with_first_group({**table, "freeze": True})

    def with_modifier(
        self,
        name: str,
        params: str | Sequence[str] | None = None,
        *,
        match: Mapping[str, Any] | None = None,
        layers: Sequence[str | Sequence[str]] | None = None,
        layer_decay: float | None = None,
        min_scale: float | None = None,
        optional: bool = False,
        **options: Any,
    ) -> ParamGroupSpec:
        """Return a spec with one more modifier, which comes last and changes options in whichever group they are.

        ``params``, ``match``, ``optional`` and ``options`` mean the same as in ``with_group``. A modifier without
        ``params`` and ``match`` changes the options of every parameter. ``layers`` lists patterns from the input to
        the output: the learning rate is multiplied by ``layer_decay`` once for each layer above, but by no less than
        ``min_scale``.

        Raises:
            GroupsError: Another modifier has the name, or a pattern or an option is wrong.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
            >>> spec = ckptkit.param_group_preset("no-decay", lr=0.1)
            >>> spec = spec.with_modifier("depth", layers=["0.*", "1.*"], layer_decay=0.5)
            >>> groups = ckptkit.build_param_groups(model, spec)
            >>> {name: group["lr"] for group in groups for name in group["param_names"] if name.endswith("weight")}
            {'0.weight': 0.05, '1.weight': 0.1}
        """
        require_flags(optional=optional)
        table = _table(name, params, match, optional=optional, options=options)
        numbers = {"layers": layers, "layer_decay": layer_decay, "min_scale": min_scale}
        table |= {key: value for key, value in numbers.items() if value is not None}
        modifier = parse_modifier(table, len(self.modifiers) + 1)
        return checked(replace(self, modifiers=(*self.modifiers, modifier)))

    def with_defaults(self, **options: Any) -> ParamGroupSpec:
        """Return a spec with other defaults: the given options are added, or replace those of the same name.

        Raises:
            GroupsError: An option is wrong.

        Example:
            >>> ckptkit.param_group_preset("no-decay", lr=1e-3).with_defaults(lr=3e-4, eps=1e-6).defaults
            {'lr': 0.0003, 'weight_decay': 0.01, 'eps': 1e-06}
        """
        return checked(replace(self, defaults={**self.defaults, **options}))

    def combined_with(self, other: ParamGroupSpec, model: CheckpointLike | None = None) -> ParamGroupSpec:
        """Return a spec that does what both specs do: the groups and modifiers of this one, then those of ``other``.

        A group for all remaining parameters that sets no option gives way to one that does. A default, an optimizer
        class or a policy that only one of the specs sets counts for both. Of two modifiers that set the same option,
        that of ``other`` counts; two modifiers with one name get different names.

        ``model`` is needed only where both specs have further groups, because no parameter may have an owner in both.

        Raises:
            GroupsError: A parameter would have an owner in both, or two groups have one name. Both specs have layers,
                or set a default or a policy to different values. The message names both sides.
            ArgumentError: ``other`` is not a ``ParamGroupSpec``.

        Example:
            >>> no_decay = ckptkit.param_group_preset("no-decay", lr=0.01, weight_decay=0.1)
            >>> head = ckptkit.param_group_preset("head-lr", lr=0.01, weight_decay=0.1, head={"params": "1.*"})
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
            >>> for group in ckptkit.build_param_groups(model, no_decay.combined_with(head)):
            ...     print(group["param_names"], group["lr"], group["weight_decay"])
            ['0.weight'] 0.01 0.1
            ['0.bias'] 0.01 0.0
            ['1.weight'] 0.1 0.1
            ['1.bias'] 0.1 0.0
        """
        if not isinstance(other, ParamGroupSpec):
            refuse(other, "other", "a ParamGroupSpec")
        return checked(ParamGroupSpec(**combined_fields(checked(self), checked(other), model)))

    def to_dict(self) -> dict[str, Any]:
        """Return the table of the spec, as a spec file has it; every function that takes a spec takes it.

        Example:
            >>> spec = ckptkit.param_group_preset("no-decay", lr=1e-3).with_group("head", "fc.*", lr_mult=10)
            >>> spec.to_dict()["group"]
            [{'name': 'head', 'params': 'fc.*', 'override': True, 'lr_mult': 10}, {'name': 'base', 'rest': True}]
        """
        return spec_table(self)

    def to_toml(self) -> str:
        """Return the spec as the text of a TOML file, which is read back as the same spec.

        TOML has lists only: a tuple, such as ``betas``, is read back as a list, which torch takes alike.

        Raises:
            GroupsError: TOML cannot express an option, such as a tensor or None.

        Example:
            >>> print(ckptkit.param_group_preset("no-decay").with_group("head", "fc.*", lr_mult=10).to_toml())
            [defaults]
            lr = 0.001
            weight_decay = 0.01
            <BLANKLINE>
            [[group]]
            name = "head"
            params = "fc.*"
            override = true
            lr_mult = 10
            ...
        """
        return dump_spec(self, "toml")

    def _with_first_group(self, table: Mapping[str, Any]) -> ParamGroupSpec:
        return checked(replace(self, rules=(parse_group({**table, "override": True}, 1), *self.rules)))


def _table(
    name: str,
    params: str | Sequence[str] | None,
    match: Mapping[str, Any] | None,
    *,
    optional: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the table of a group or modifier, as it stands in a spec file."""
    given = {"params": list(params) if isinstance(params, tuple) else params, "match": match}
    table = {"name": name, **{key: value for key, value in given.items() if value is not None}, **options}
    return table | ({"optional": optional} if optional else {})
