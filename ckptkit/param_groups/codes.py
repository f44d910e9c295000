"""The kinds of findings about param groups: of a spec, of live groups and optimizers, of a lock, of a rebind."""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

# A spec, alone and for a model.
UNOWNED = Code("groups.unowned", ("error",), "A trainable parameter matches no group of the spec.")
OVERLAP = Code("groups.overlap", ("error",), "A parameter matches several groups of a spec that forbids this.")
RULE_UNMATCHED = Code(
    "groups.rule-unmatched", ("error",), "A group, a modifier or one of its patterns matches no parameter of the model."
)
RULE_SHADOWED = Code(
    "groups.rule-shadowed", ("error",), "Earlier groups of the spec already own every parameter that a group matches."
)
RULE_FROZEN = Code("groups.rule-frozen", ("error",), "A group or a modifier matches frozen parameters only.")
RULE_TIED = Code(
    "groups.rule-tied", ("error",), "A group matches only another name of a tied parameter that an earlier group owns."
)
OPTIMIZER_UNUSED = Code(
    "groups.optimizer-unused", ("warning",), "The spec has options for an optimizer class that no group uses."
)
LAYER_UNMATCHED = Code(
    "groups.layer-unmatched", ("warning",), "A modifier matches a parameter but finds no layer number for it."
)
LAYER_GAP = Code("groups.layer-gap", ("note",), "The layer numbers that a modifier finds in the model have a gap.")
NEEDS_MODEL = Code("groups.needs-model", ("warning",), "Only the live model can tell whether a condition is met.")
ASSUMED = Code("groups.assumed", ("note",), "A property of the parameters was assumed, because the file does not say.")

# Which parameters the groups hold.
MISSING = Code("groups.missing", ("error",), "A trainable parameter is in no param group.")
DUPLICATE = Code("groups.duplicate", ("error",), "A parameter is in the param groups more than once.")
TIED = Code(
    "groups.tied",
    ("error", "note"),
    "One tied parameter is in several groups, or its names may need different options.",
)
STALE = Code("groups.stale", ("error",), "A group holds an old tensor that the model has since replaced.")
FOREIGN = Code("groups.foreign", ("error",), "A group holds a tensor that is not a parameter of the model.")
SHARDED = Code("groups.sharded", ("error",), "The groups hold flat shards of DeepSpeed instead of the parameters.")
UNREGISTERED = Code(
    "groups.unregistered", ("warning",), "A module keeps trainable tensors that model.parameters() does not return."
)
FROZEN = Code("groups.frozen", ("error", "warning"), "A frozen parameter is in a group, or the spec forbids it.")
LAZY = Code("groups.lazy", ("error", "warning"), "A parameter has no shape before the first forward pass.")
EMPTY = Code("groups.empty", ("error", "note"), "A param group holds no parameter.")
ONE_SHOT = Code("groups.one-shot", ("error",), "The params of a group are an iterator that can be read only once.")
UNORDERED = Code("groups.unordered", ("error",), "The params of a group are a set, which has no fixed order.")
NOT_A_PARAMETER = Code("groups.not-a-parameter", ("error",), "A group holds something that no optimizer can train.")
BUFFER = Code("groups.buffer", ("error",), "A group holds a buffer, which gets no gradient.")
NAMES = Code(
    "groups.names", ("error", "warning"), "The recorded names of parameters are incomplete, repeated or wrong."
)
SHARED = Code("groups.shared", ("error",), "One group dict, or one optimizer, was given twice.")
CACHED = Code("groups.cached", ("warning",), "A wrapper has other group dicts than the optimizer that it wraps.")
META = Code("groups.meta", ("error",), "An optimizer steps parameters on the meta device, which have no values.")
SHARED_MEMORY = Code("groups.shared-memory", ("warning",), "Two parameters overlap in memory, so a step changes both.")
SHARED_MODULE = Code("groups.shared-module", ("note",), "One module is registered under several names and trains once.")
FROZEN_STATISTICS = Code(
    "groups.frozen-statistics", ("note",), "A norm of a frozen module is in train mode, so its statistics change."
)
ASSIGNMENT = Code(
    "groups.assignment",
    ("error", "warning"),
    "A value was assigned over a method, or to an attribute that torch does not read.",
)
TIE_LOST = Code(
    "groups.tie-lost", ("error", "warning"), "Two parameters should be one tied parameter, and train apart."
)
SIBLINGS = Code("groups.siblings", ("warning", "note"), "The parameters of one module have several dtypes or devices.")
NO_PARAMETERS = Code("groups.no-parameters", ("note",), "The model has modules but no parameter.")

# The options of live groups.
OPTION_VALUE = Code("groups.option-value", ("error",), "The value of an option is out of range or of the wrong type.")
OPTION_UNREAD = Code("groups.option-unread", ("warning",), "The optimizer does not read an option of a group.")
OPTION_MISSING = Code("groups.option-missing", ("error",), "A group lacks an option that the optimizer reads.")
OPTION_SET = Code("groups.option-set", ("warning",), "A group has options that its optimizer class refuses.")
MULTIPLIER = Code("groups.multiplier", ("warning",), "Nothing applies the lr_scale, lr_mult or decay_mult of a group.")
DECAY = Code("groups.decay", ("note",), "Weight decay acts on vectors: norms, biases or scales.")
SHARED_LR = Code("groups.shared-lr", ("warning",), "Several groups share one tensor as their lr.")
MANY = Code("groups.many", ("note",), "Many groups have the same options, which makes each step slow.")
MATRICES_ONLY = Code("groups.matrices-only", ("error", "warning"), "Muon gets a parameter that is not a matrix.")
HIDDEN_ONLY = Code(
    "groups.hidden-only", ("warning",), "Muon gets the weight of an embedding or of the output layer of the model."
)
TRAIN_MODE = Code(
    "groups.train-mode", ("warning",), "A schedule-free optimizer is in train mode while the model is in eval mode."
)
ONE_GROUP = Code("groups.one-group", ("error",), "The optimizer class takes one group only and has several.")
DECOUPLED = Code(
    "groups.decoupled",
    ("error", "warning"),
    "The step applies weight decay in another way than the optimizer class does.",
)
CAPTURABLE = Code("groups.capturable", ("error",), "A group is capturable, but its parameters are on a CPU or on MPS.")
MIXED = Code("groups.mixed", ("error",), "One fused or foreach group mixes DTensors and plain tensors.")

# The state of live optimizers.
STATE_SHAPE = Code("groups.state-shape", ("error",), "The state of a parameter has the wrong shape.")
STATE_DTYPE = Code("groups.state-dtype", ("error", "warning"), "The state of a parameter has another dtype.")
STATE_DEVICE = Code("groups.state-device", ("error", "warning"), "The state of a parameter is on another device.")
STATE_LAYOUT = Code(
    "groups.state-layout",
    ("error",),
    "A fused step reads a state tensor in another order of memory than its parameter.",
)
STATE_INCOMPLETE = Code(
    "groups.state-incomplete", ("error", "warning"), "The state of a parameter lacks a slot that the optimizer reads."
)
STATE_ORPHAN = Code("groups.state-orphan", ("error",), "The optimizer keeps state for a tensor that is in no group.")
STATE_STRAY = Code("groups.state-stray", ("warning",), "The optimizer keeps state that it does not read.")
STATE_STEPS = Code(
    "groups.state-steps", ("warning", "note"), "The parameters of an optimizer have different step counts."
)
STATE_ABSENT = Code("groups.state-absent", ("note",), "Only some parameters of the optimizer have state.")
STATE_EMPTY = Code("groups.state-empty", ("warning",), "The scheduler is past step 0, but the optimizer has no state.")
STATE_VALUE = Code("groups.state-value", ("error",), "The state of a parameter holds NaN, Inf or an impossible number.")
STATE_ZERO = Code(
    "groups.state-zero", ("warning",), "Parameters have made steps, but every other value of the state is 0."
)
STATE_SHARED = Code("groups.state-shared", ("error",), "A state tensor shares memory with another one or a parameter.")
STATE_DEAD = Code("groups.state-dead", ("note",), "The optimizer keeps state for tensors that the model does not have.")

# Learning rate schedulers.
SCHEDULER_LENGTH = Code(
    "groups.scheduler-length", ("error", "warning"), "A scheduler was built for another number of groups."
)
SCHEDULER_BASE_LR = Code(
    "groups.scheduler-base-lr", ("warning",), "The base lr of a scheduler differs from the initial_lr of the group."
)
SCHEDULER_INITIAL_LR = Code(
    "groups.scheduler-initial-lr",
    ("warning",),
    "A new scheduler starts from an initial_lr, not from the lr of the group.",
)
SCHEDULER_LR = Code(
    "groups.scheduler-lr",
    ("error", "warning", "note"),
    "A group has another lr than its scheduler set, as after a load in the wrong order.",
)
SCHEDULER_MINIMUM = Code(
    "groups.scheduler-minimum", ("warning",), "The minimum of a scheduler is above the lr of a group."
)
SCHEDULER_OPTIMIZER = Code(
    "groups.scheduler-optimizer", ("error",), "A scheduler changes the lr of an optimizer that was not given."
)
SCHEDULER_FLAT = Code(
    "groups.scheduler-flat",
    ("warning", "note"),
    "A scheduler or a script set all groups to one lr and replaced their own.",
)

# Live groups against a spec, and one lock against another.
GONE = Code("groups.gone", ("error",), "A locked parameter is no longer in the model.")
NEW = Code("groups.new", ("error",), "The model has a parameter that the lock does not have.")
SHAPE = Code("groups.shape", ("error",), "A parameter has another shape than in the lock.")
DTYPE = Code("groups.dtype", ("warning",), "A parameter has another dtype than in the lock.")
TIES = Code("groups.ties", ("error",), "A parameter is tied to other parameters than in the lock.")
MOVED = Code("groups.moved", ("error",), "A parameter is in another group than the spec or the lock says.")
ORDER = Code("groups.order", ("error",), "The parameters have another order than in the lock.")
THAWED = Code("groups.thawed", ("warning",), "A parameter entered the groups or left them since the lock was made.")
OPTIONS = Code(
    "groups.options", ("error", "warning", "note"), "A group has other options than the spec or the lock says."
)

# The changes that rebind made.
REPOINTED = Code("rebind.repointed", ("note",), "A group now holds the parameter that replaced an old one.")
REMOVED = Code("rebind.removed", ("note",), "A tensor that the model no longer has was taken out of its group.")
ADDED = Code("rebind.added", ("note",), "A parameter that was in no group was added to a group.")
RENAMED = Code("rebind.renamed", ("note",), "The recorded name of a parameter was corrected.")
STATE_DROPPED = Code("rebind.state-dropped", ("note",), "State was dropped, so its parameter starts without state.")
STATE_CONVERTED = Code("rebind.state-converted", ("note",), "State was padded, cast or moved to fit its parameter.")
STILL_MISSING = Code("rebind.missing", ("warning",), "A trainable parameter is still in no group.")

CODES = codes_in(globals())
