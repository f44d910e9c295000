"""The kinds of findings of a preflight, without the kinds of param groups and of optimizer state."""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

# The initial checkpoint.
INIT_NOTHING = Code("preflight.init-nothing", ("error",), "The initial checkpoint fills no tensor of the model.")
INIT_REFUSED = Code("preflight.init-refused", ("error",), "torch refuses to copy a tensor of the initial checkpoint.")
INIT_QUANTIZED = Code(
    "preflight.init-quantized",
    ("error",),
    "A weight is quantised in the initial checkpoint and plain in the model, or the reverse.",
)
AT_INIT = Code("preflight.at-init", ("warning", "note"), "Tensors of the initial checkpoint look newly initialised.")
REQUIRED = Code(
    "preflight.required", ("error",), "The initial checkpoint does not fill what require or min_coverage asks for."
)
INIT_CAST = Code("preflight.init-cast", ("warning",), "Loading casts tensors to a dtype with fewer bits.")
NOT_FRESH = Code("preflight.not-fresh", ("error",), "The initial checkpoint fills a tensor that must stay at init.")
KEPT = Code("preflight.kept", ("warning", "note"), "Tensors that train are not in the initial checkpoint.")
FROZEN_AT_INIT = Code(
    "preflight.frozen-at-init", ("warning",), "Frozen tensors are not in the initial checkpoint, so they stay at init."
)
TIE_LOST = Code(
    "preflight.tie-lost", ("warning",), "Tensors that init has tied, or equal, are separate parameters of the model."
)
NOT_LOADED = Code("preflight.not-loaded", ("note",), "The model does not have the values of init yet.")
PARTLY_LOADED = Code(
    "preflight.partly-loaded", ("warning",), "The model has the values of the initial checkpoint in some tensors only."
)

# The values of the model.
NOT_FINITE = Code("preflight.not-finite", ("error", "warning", "note"), "A tensor of the model holds NaN or Inf.")
ZERO = Code("preflight.zero", ("warning",), "A matrix that nothing was loaded into is all zero.")
CONSTANT = Code("preflight.constant", ("warning",), "A matrix that nothing was loaded into has one value everywhere.")
GARBAGE = Code("preflight.garbage", ("warning",), "A tensor looks like memory that was never written.")

# The param groups and the optimizer.
OPTIMIZER = Code("preflight.optimizer", ("error",), "The optimizer class refuses the param groups.")
SPEC_IGNORED = Code("preflight.spec-ignored", ("error",), "The live optimizer does not follow the spec.")
NOTHING_TRAINS = Code("preflight.nothing-trains", ("error",), "All parameters are frozen.")
LR_ZERO = Code("preflight.lr-zero", ("error", "warning"), "The lr of some or all groups is 0.")

# Dtypes.
INTEGERS = Code("preflight.integers", ("note",), "Parameters of an integer dtype cannot have gradients.")
MIXED_DTYPES = Code("preflight.mixed-dtypes", ("note",), "The parameters that train have several dtypes.")
BF16_WEIGHTS = Code("preflight.bf16-weights", ("warning",), "The optimizer updates weights in bfloat16.")
EPS = Code("preflight.eps", ("error",), "The eps of the optimizer is 0 in the dtype of the weights.")

REFUSED = Code("preflight.refused", ("error",), "The model's own code for loading refuses init.")
UNDECIDED = Code(
    "preflight.undecided", ("note",), "The model's own code for loading could not be tried, so names decided."
)

# The run to resume.
RESUME_WEIGHTS = Code(
    "preflight.resume-weights",
    ("error", "warning"),
    "load_state_dict refuses the weights of the run; a warning where only names could decide.",
)
RESUME_QUANTIZED = Code(
    "preflight.resume-quantized", ("error",), "A weight is quantised in the run and plain in the model, or the reverse."
)
RESUME_UNCLEAR = Code(
    "preflight.resume-unclear", ("warning", "note"), "The optimizer state of the run cannot be compared with the model."
)
RESUME_NAMES = Code(
    "preflight.resume-names", ("error",), "The optimizer state of the run has other parameter names than the groups."
)
RESUME_GROUPS = Code("preflight.resume-groups", ("error",), "The groups of the run have other sizes.")
RESUME_ORDER = Code("preflight.resume-order", ("error",), "Parameters would get the optimizer state of others.")
RESUME_SHAPE = Code("preflight.resume-shape", ("error",), "The optimizer state of a parameter has another shape.")
RESUME_NEW = Code("preflight.resume-new", ("warning", "note"), "Parameters have no optimizer state in the run.")
RESUME_CLASS = Code("preflight.resume-class", ("error",), "The optimizer state of the run is of another class.")
RESUME_OPTIONS = Code(
    "preflight.resume-options", ("warning", "error"), "Loading the optimizer state changes an option of a group."
)
RESUME_LOST = Code(
    "preflight.resume-lost", ("error", "warning"), "Loading the optimizer state deletes an option of a group."
)

# The dry step.
NO_COPY = Code("preflight.no-copy", ("warning",), "The model cannot be copied, so no dry step was made.")
STEP_FAILED = Code("preflight.step-failed", ("error",), "The loss function, the backward pass or the step failed.")
LOSS = Code("preflight.loss", ("error",), "The loss is NaN or infinite.")
MADE_IN_FORWARD = Code(
    "preflight.made-in-forward", ("error", "warning"), "The forward pass made a parameter, or replaced one."
)
FROZEN_BUFFERS = Code(
    "preflight.frozen-buffers", ("warning", "note"), "The forward pass changed buffers of a frozen module."
)
NO_GRADIENT = Code("preflight.no-gradient", ("warning", "note"), "Parameters that train got no gradient.")
GRADIENT = Code("preflight.gradient", ("error",), "A gradient holds NaN or Inf.")
ZERO_GRADIENT = Code("preflight.zero-gradient", ("warning", "note"), "A gradient is 0 everywhere.")
WARM_UP = Code(
    "preflight.warm-up", ("note",), "The lr is 0 at this step of a schedule, so the dry step used initial_lr."
)
NOT_MOVED = Code(
    "preflight.not-moved", ("warning", "note"), "Parameters got a gradient, but the step did not change them."
)
FROZEN_MOVED = Code("preflight.frozen-moved", ("error",), "A frozen parameter changed.")

CODES = codes_in(globals())
