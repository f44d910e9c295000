"""Rules rename, keep and drop keys in one simultaneous pass; no key is lost or renamed by accident."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.load import as_rules
from ckptkit.rules.model import KeyMap, Rules
from ckptkit.rules.parse import parse_rules, rule_lines

NET = ("module.fc.weight", "module.fc.bias", "module.bn.weight", "step")


def applied(keys: tuple[str, ...] | list[str] = NET, **options: Any) -> KeyMap:
    return apply_rules(parse_rules(**options), keys)


def from_file(text: str, keys: tuple[str, ...] | list[str]) -> KeyMap:
    return apply_rules(parse_rules(file=tomllib.loads(text)), keys)


@pytest.mark.parametrize(
    ("options", "keys", "renamed"),
    [
        pytest.param({}, ["a", "b"], {"a": "a", "b": "b"}, id="no rules"),
        pytest.param({"rename": ["a=b", "b=a"]}, ["a", "b"], {"a": "b", "b": "a"}, id="a swap"),
        pytest.param({"rename": ["a=b", "b=c", "c=a"]}, ["a", "b", "c"], {"a": "b", "b": "c", "c": "a"}, id="a cycle"),
        pytest.param({"rename": ["a=b", "b=c"]}, ["a", "b"], {"a": "b", "b": "c"}, id="no chaining"),
        pytest.param({"rename": ["a.x=z", "a.*=b.*"]}, ["a.x", "a.y"], {"a.x": "z", "a.y": "b.y"}, id="first wins"),
        pytest.param(
            {"rename": ["h.{i:int}=h.{i+1}"]}, ["h.0", "h.1", "h.2"], {"h.0": "h.1", "h.1": "h.2", "h.2": "h.3"},
            id="a shift over itself",
        ),
        pytest.param({"drop": ["a"], "rename": ["a*=b*"]}, ["a", "ax"], {"ax": "bx"}, id="dropping before renaming"),
        pytest.param({"keep": ["a*"], "rename": ["a=b"]}, ["a", "b", "ax"], {"a": "b", "ax": "ax"}, id="keeping first"),
        pytest.param({"keep": ["a", "b"]}, ["c", "b", "a"], {"b": "b", "a": "a"}, id="kept in the order of the keys"),
        pytest.param({"rename": ["1e5=0012"]}, ["1e5", "100000"], {"1e5": "0012", "100000": "100000"}, id="digits"),
        pytest.param({"keep": ["*"]}, [""], {"": ""}, id="a bare tensor has no name and needs none"),
        pytest.param({"rename": ["*=w*"]}, [""], {"": "w"}, id="a bare tensor gets a name"),
    ],
)  # fmt: skip
def test_rules_run_in_one_simultaneous_pass(options: Any, keys: list[str], renamed: dict[str, str]) -> None:
    key_map = applied(keys, **options)
    assert dict(key_map.renamed) == renamed
    assert list(key_map.renamed) == [key for key in keys if key in renamed]
    assert set(key_map.dropped) == set(keys) - set(renamed)


def test_the_key_map_names_the_rules() -> None:
    key_map = applied(rename=["module.*=*"], drop=["step"], keep=["module.fc.*", "step"])
    assert dict(key_map.renamed) == {"module.fc.weight": "fc.weight", "module.fc.bias": "fc.bias"}
    assert key_map.rule_of["module.fc.bias"] == "--rename 'module.*=*'"
    assert dict(key_map.dropped) == {"module.bn.weight": "matches no --keep", "step": "--drop 'step'"}


@pytest.mark.parametrize(
    ("keys", "rename"),
    [
        pytest.param(["a.w", "b.w"], ["a.*=*", "b.*=*"], id="two renamed"),
        pytest.param(["a.w", "w"], ["a.*=*"], id="one renamed onto another"),
        pytest.param(["w", "a.w"], ["a.*=*"], id="whichever comes first"),
        pytest.param(["a.w", "b.w"], ["re:..(.*)=\\1"], id="one rule, two keys"),
    ],
)
def test_two_keys_with_one_new_name_are_an_error_naming_both(keys: list[str], rename: list[str]) -> None:
    with pytest.raises(RuleError, match="would both be called 'w'") as caught:
        applied(keys, rename=rename)
    assert all(f"'{key}'" in caught.value.reason for key in keys)
    assert caught.value.hint


COLLISION = """
[[rule]]
from = "{name}.*"
to = "*"
on_collision = "{first}"
[[rule]]
from = "b.*"
to = "*"
on_collision = "{second}"
"""


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        pytest.param("first", "first", "a.w", id="first"),
        pytest.param("last", "last", "b.w", id="last"),
        pytest.param("error", "last", "b.w", id="one of two rules chooses"),
        pytest.param("first", "error", "a.w", id="the other chooses"),
    ],
)
def test_a_collision_can_be_decided_and_the_loser_is_listed(first: str, second: str, kept: str) -> None:
    key_map = from_file(COLLISION.format(name="a", first=first, second=second), ["a.w", "b.w", "c"])
    lost = "a.w" if kept == "b.w" else "b.w"
    assert dict(key_map.renamed) == {kept: "w", "c": "c"}
    assert dict(key_map.dropped) == {lost: f"'{kept}' gets the name 'w'"}


def test_rules_that_decide_a_collision_differently_decide_nothing() -> None:
    with pytest.raises(RuleError, match="would both be called"):
        from_file(COLLISION.format(name="a", first="first", second="last"), ["a.w", "b.w"])


def test_of_three_keys_the_last_one_stays() -> None:
    text = '[[rule]]\nfrom = "{x}.w"\nto = "w"\non_collision = "last"'
    key_map = from_file(text, ["a.w", "b.w", "c.w"])
    assert dict(key_map.renamed) == {"c.w": "w"}
    assert set(key_map.dropped) == {"a.w", "b.w"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"rename": ["modul.*=*"]}, "--rename 'modul.*=*' matches none of 4 keys", id="rename"),
        pytest.param({"drop": ["fc"]}, "--drop 'fc' matches none of 4 keys", id="drop"),
        pytest.param({"keep": ["fc", "module.*"]}, "--keep 'fc' matches none of 4 keys", id="keep"),
        pytest.param(
            {"keep": ["step"], "drop": ["module.*"]}, "--drop 'module.*' matches none of 1 key", id="after keeping"
        ),
        pytest.param(
            {"rename": ["module.*=*", "module.fc.*=head.*"]},
            "--rename 'module.fc.*=head.*' is shadowed: the earlier --rename 'module.*=*' matches all its keys",
            id="shadowed",
        ),
        pytest.param(
            {"drop": ["*.bias"], "rename": ["module.fc.bias=b"]},
            "is shadowed: the earlier --drop '*.bias' matches all its keys",
            id="by a drop",
        ),
    ],
)
def test_a_rule_that_does_nothing_is_an_error_unless_allowed(options: Any, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        applied(**options)
    assert reason in caught.value.reason
    assert "--allow-unused" in (caught.value.hint or "")
    key_map = applied(**options, allow_unused=True)
    assert any(reason in note for note in key_map.notes)


def test_an_optional_rule_may_do_nothing_and_that_is_noted() -> None:
    key_map = from_file('[[rule]]\nfrom = "x"\nto = "y"\noptional = true', ["a"])
    assert dict(key_map.renamed) == {"a": "a"}
    assert key_map.notes == ("rule 'x=y' ([[rule]] 1) matches none of 1 key",)


def test_a_name_that_a_rule_empties_is_an_error_naming_rule_and_key() -> None:
    with pytest.raises(RuleError, match=r"rename='step=' leaves 'step' without a name"):
        applied(rename=["step="])


def test_an_index_below_zero_is_an_error_naming_the_key() -> None:
    with pytest.raises(RuleError, match=r"gives 'h\.0' the negative index -1"):
        applied(["h.1", "h.0"], rename=["h.{i:int}=h.{i-1}"])


def test_stages_see_the_names_that_the_one_before_made() -> None:
    text = """
    [[rule]]
    from = "module.*"
    to = "*"
    [[stage]]
    keep = "fc.*"
    [[stage.rule]]
    from = "fc.weight"
    to = "head.weight"
    [[stage]]
    [[stage.rule]]
    from = "*.bias"
    drop = true
    """
    key_map = from_file(text, NET)
    assert dict(key_map.renamed) == {"module.fc.weight": "head.weight"}
    assert key_map.rule_of["module.fc.weight"] == (
        "rule 'module.*=*' ([[rule]] 1), rule 'fc.weight=head.weight' ([[stage]] 1, [[rule]] 1)"
    )
    assert key_map.dropped["module.fc.bias"] == "drop '*.bias' ([[stage]] 2, [[rule]] 1)"
    assert key_map.dropped["step"] == "matches no --keep"


def test_a_command_line_comes_before_the_file() -> None:
    rules = parse_rules(rename=["a=b"], file={"rule": [{"from": "b", "to": "c"}]})
    assert dict(apply_rules(rules, ["a"]).renamed) == {"a": "c"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("rules = 1", "a rule file has the unknown key 'rules'", id="unknown key"),
        pytest.param("rule = 1", "rule must be a list of tables", id="no list"),
        pytest.param("rule = [1]", "rule must be a list of tables", id="no tables"),
        pytest.param("keep = 1", "keep must be a pattern", id="keep is a number"),
        pytest.param("keep = ['a', 1]", "keep must be a pattern", id="keep holds a number"),
        pytest.param("[[rule]]\nto = 'a'", "[[rule]] 1: the rule needs a pattern", id="no from"),
        pytest.param(
            "[[rule]]\nfrom = 'a'\nto = 'b'\n[[rule]]\nfrom = 'a'", "[[rule]] 2: the rule needs either", id="no to"
        ),
        pytest.param(
            "[[rule]]\nfrom = 'a'\nto = 'b'\ndrop = true", "[[rule]] 1: the rule needs either", id="to and drop"
        ),
        pytest.param("[[rule]]\nfrom = 'a'\nto = 1", "[[rule]] 1: to must be a string or a list", id="to is a number"),
        pytest.param("[[rule]]\nfrom = 'a'\ndrop = 'yes'", "[[rule]] 1: drop and optional must be", id="drop is text"),
        pytest.param("[[rule]]\nfrom = 'a{'\nto = 'b'", "[[rule]] 1: 'a{' has a brace", id="bad pattern"),
        pytest.param("[[rule]]\nfrom = 'a'\nto = '*'", "[[rule]] 1: 'a=*' has 0 '*'", id="bad template"),
        pytest.param("[[rule]]\nfrom = 'a'\nto = 'b'\non_collision = []", "[[rule]] 1: on_collision", id="collision"),
        pytest.param(
            "[[rule]]\nfrom = 'a'\nto = 'b'\nif = 1",
            "[[rule]] 1: the rule has the unknown key 'if'",
            id="unknown in rule",
        ),
        pytest.param(
            "[[stage]]\n[[stage]]\n[[stage.rule]]\nfrom = 1",
            "[[stage]] 2, [[rule]] 1: from must be a string or a list",
            id="in a stage",
        ),
        pytest.param("[[stage]]\nstage = []", "[[stage]] 1 has the unknown key 'stage'", id="a stage in a stage"),
    ],
)
def test_an_error_in_a_rule_file_names_the_rule_by_its_number(text: str, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(file=tomllib.loads(text))
    assert reason in caught.value.reason


def test_callers_may_pass_rules_in_several_forms() -> None:
    key_map = parse_rules(rename=["a=b"])
    table = {"rule": [{"from": "a", "to": "b"}]}
    forms = [as_rules(form) for form in (key_map, ["a=b"], table)]
    assert [dict(apply_rules(form, ["a"]).renamed) for form in forms] == [{"a": "b"}] * 3
    assert as_rules(None) == Rules()
    with pytest.raises(RuleError, match=r"rules=\['a=b'\]"):
        as_rules("a=b")


SEGMENT = st.sampled_from(["a", "b", "w", "0", "1", "10"])
KEY = st.lists(SEGMENT, min_size=1, max_size=3).map(".".join)
KEY_SETS = st.lists(KEY, unique=True, max_size=12)
RENAMES = st.sampled_from(
    [
        "a.*=*",
        "*=p.*",
        "*.w=*.weight",
        "{x}.{y}={y}.{x}",
        "{i:int}.*={i+1}.*",
        "a=b",
        "b=a",
        "re:(.*)\\.0=\\1",
        "*.*=*_*",
    ]
)


@given(KEY_SETS, st.lists(RENAMES, max_size=4), st.lists(KEY | st.just("*.w"), max_size=2), st.lists(KEY, max_size=2))
def test_nothing_is_lost_and_no_name_is_given_twice(
    keys: list[str], rename: list[str], drop: list[str], keep: list[str]
) -> None:
    try:
        key_map = applied(keys, rename=rename, drop=drop, keep=keep, allow_unused=True)
    except RuleError as error:
        assert "both be called" in error.reason  # noqa: PT017 - the one refusal that these rules can meet
        return
    assert set(key_map.renamed) | set(key_map.dropped) == set(keys)
    assert set(key_map.renamed).isdisjoint(key_map.dropped)
    assert len(set(key_map.renamed.values())) == len(key_map.renamed)


@given(KEY_SETS, st.sampled_from(["first", "last"]), st.lists(RENAMES, min_size=1, max_size=4))
def test_with_a_decision_there_is_no_collision_and_still_nothing_lost(
    keys: list[str], policy: str, rename: list[str]
) -> None:
    pairs = (text.removeprefix("re:").rpartition("=") for text in rename if not text.startswith("re:"))
    table = {"rule": [{"from": a, "to": b, "on_collision": policy, "optional": True} for a, _, b in pairs]}
    key_map = apply_rules(parse_rules(file=table), keys)
    assert set(key_map.renamed) | set(key_map.dropped) == set(keys)
    assert len(set(key_map.renamed.values())) == len(key_map.renamed) == len(keys) - len(key_map.dropped)


@given(KEY_SETS, st.permutations(["a.*=x.*", "b.*=y.*", "w.*=z.*", "0=n", "10.*=ten.*"]))
def test_renames_that_fit_different_keys_may_come_in_any_order(keys: list[str], rename: list[str]) -> None:
    key_map = applied(keys, rename=rename, allow_unused=True)
    assert key_map.renamed == applied(keys, rename=sorted(rename), allow_unused=True).renamed


@given(KEY_SETS, KEY)
def test_a_prefix_that_is_added_can_be_stripped_again(keys: list[str], prefix: str) -> None:
    added = applied(keys, rename=[f"*={prefix}.*"], allow_unused=True).renamed
    stripped = applied(list(added.values()), rename=[f"{prefix}.*=*"], allow_unused=True).renamed
    assert [stripped[added[key]] for key in keys] == keys


def test_equals_of_two_stages_are_all_compared() -> None:
    """A key that must equal the loser of a second collision must equal the winner too."""
    text = """
    [[rule]]
    from = ["a", "b"]
    to = "x"
    on_collision = "equal"
    [[rule]]
    from = ["c", "d"]
    to = "y"
    on_collision = "equal"
    [[stage]]
    [[stage.rule]]
    from = ["x", "y"]
    to = "z"
    on_collision = "equal"
    """
    assert from_file(text, list("abcd")).outputs()["z"].equals == ("b", "c", "d")


def test_lines_of_rules_written_below_a_stage() -> None:
    """A [[rule]] is in the first stage wherever it is in the file, and errors name its line."""
    text = '[[stage]]\n[[stage.rule]]\nfrom = "b"\nto = "c"\n[[rule]]\nfrom = "a"\nto = "b"\n'
    assert rule_lines(text) == (5, 2)


def test_more_stages_than_a_plan_can_hold_are_refused() -> None:
    with pytest.raises(RuleError, match="60 stages"):
        parse_rules(file={"stage": [{"keep": "*"}] * 60})


def stages(number: int, start: str, target: object) -> dict[str, object]:
    return {"stage": [{"rule": [{"from": start, "to": target}]} for _ in range(number)]}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        pytest.param(stages(40, "*", ["*.a", "*.b"]), "more than 6 stages make more tensors", id="copies"),
        pytest.param(stages(3, "*", [f"*.{n}" for n in range(100)]), "make more than 50,004 tensors", id="many names"),
        pytest.param(stages(40, "{x}", "{x}{x}"), "names of more than 4,000,004 characters", id="long names"),
        pytest.param(stages(40, "re:(.*)", "\\1\\1"), "names of more than 4,000,004 characters", id="regex"),
    ],
)
def test_rules_that_grow_without_end_are_refused(table: dict[str, object], reason: str) -> None:
    with pytest.raises(RuleError, match=reason):
        apply_rules(parse_rules(file=table), ["w"])


def test_a_few_stages_may_make_more_tensors() -> None:
    table = stages(6, "*", ["*.a", "*.b"])
    assert len(apply_rules(parse_rules(file=table), ["w"]).outputs()) == 64
