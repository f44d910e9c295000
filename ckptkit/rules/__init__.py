"""Ordered rules: from the keys that are there to the keys that shall be."""

from __future__ import annotations

from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import KeyMap, Made, Rule, Rules, Stage, describe_made
from ckptkit.rules.parse import as_rules, parse_rules, rule_lines, rules_from_table
from ckptkit.rules.variables import Settings, parse_setting

__all__ = [
    "KeyMap",
    "Made",
    "Rule",
    "Rules",
    "Settings",
    "Stage",
    "apply_rules",
    "as_rules",
    "describe_made",
    "parse_rules",
    "parse_setting",
    "rule_lines",
    "rules_from_table",
]
