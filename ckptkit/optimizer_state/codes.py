"""The kinds of findings about the saved state of an optimizer."""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

# How the file is built.
PARAM_TWICE = Code("optim.param-twice", ("error",), "A parameter is in the groups more than once.")
POSITION_MISSING = Code("optim.position-missing", ("error",), "The positions of the parameters have a gap.")
STATE_STRAY = Code("optim.state-stray", ("error",), "There is state for a parameter that is in no group.")
NAMES_COUNT = Code("optim.names-count", ("error",), "A group has another number of names than of parameters.")
NAMES_TWICE = Code("optim.names-twice", ("error",), "One name is given to several parameters.")
NO_NAMES = Code("optim.no-names", ("error", "note"), "The state has no names, or the given names do not fit.")
UNNAMED = Code("optim.unnamed", ("note",), "The state has no names, and its parameters got them by position or order.")

# What is in the state.
NO_STATE = Code("optim.no-state", ("note",), "Only some of the parameters have state.")
STEPS_DIFFER = Code("optim.steps-differ", ("warning", "note"), "The parameters have different step counts.")
SLOT_MISSING = Code("optim.slot-missing", ("error",), "A parameter lacks a slot that the others of its group have.")

TRAIN_MODE = Code("optim.train-mode", ("warning", "note"), "A schedule-free optimizer was saved in train mode.")

# Two states.
CLASS = Code("optim.class", ("error",), "The state was saved by another class of optimizer.")
GROUPS = Code("optim.groups", ("error",), "The number or the sizes of the groups differ, so torch refuses to load.")
PARAMETERS = Code("optim.parameters", ("error",), "Only one of the two states has a parameter.")
MEMBERSHIP = Code("optim.membership", ("error",), "A parameter was saved in another group.")
ORDER = Code("optim.order", ("error",), "The parameters were saved in another order, and torch loads by position.")
SHAPE = Code("optim.shape", ("error",), "The saved state of a parameter has another shape.")
OPTIONS = Code("optim.options", ("warning",), "Loading changes an option of a parameter.")
OPTIONS_LOST = Code("optim.options-lost", ("warning",), "Loading deletes an option that was not saved.")
VALUES = Code("optim.values", ("warning", "note"), "Loading changes the values of a slot, or they were not compared.")
COVERAGE = Code("optim.coverage", ("note",), "A parameter was saved without state and starts without state.")

# What a load did.
MISSING = Code("optim.missing", ("warning",), "The file has no state for a trainable parameter.")
DROPPED = Code("optim.dropped", ("warning",), "The saved state of a parameter does not fit and was not loaded.")
UNUSED = Code("optim.unused", ("note",), "The optimizer does not have a parameter that the file has state for.")
OPTIONS_ONLY = Code("optim.options-only", ("note",), "The file has no state, so only the options were loaded.")
KEY_UNREAD = Code(
    "optim.key-unread", ("warning", "note"), "The optimizer did not take a value of the file that is of no parameter."
)
OVERFLOW = Code("optim.overflow", ("warning",), "The dtype of a parameter cannot hold a value, which became inf.")
UNDERFLOW = Code("optim.underflow", ("warning",), "The cast to the dtype of a parameter made 0 of a value.")
INITIAL_LR = Code(
    "optim.initial-lr", ("warning",), "The loaded initial_lr is not the lr that the group was built with."
)
DECAY_UNTOLD = Code(
    "optim.decay-untold", ("note",), "The file does not say whether weight decay was decoupled, as in AdamW."
)

CODES = codes_in(globals())
