"""Set-ups that train correctly get no finding above a note, neither before the first step nor after two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD, AdamW, lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

from ckptkit import rebind
from tests.features import require
from tests.helpers_healthy import Setup, loud_findings, split_by_decay


def square(model: Any, *size: int) -> torch.Tensor:
    out = model(torch.randn(size or (4, 4)))
    loss: torch.Tensor = (out[0] if isinstance(out, tuple) else out).float().square().mean()
    return loss


def tokens(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(torch.tensor([[1, 2, 3], [3, 4, 6]])).square().mean()
    return loss


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def plain(model: nn.Module, loss: Callable[[Any], Any] = square) -> Setup:
    return Setup(model, AdamW(split_by_decay(model), lr=0.01), loss)


class Forward(nn.Module):
    """A module with the given parts. Its forward pass is a function."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


def gan() -> Setup:
    model = Forward(lambda self, x: self.critic(self.maker(x)), maker=body(), critic=nn.Linear(2, 1))

    def loss(model: Any) -> torch.Tensor:
        value: torch.Tensor = model(torch.randn(4, 4)).mean() + model.critic(torch.randn(4, 2)).square().mean()
        return value

    optimizers = [torch.optim.Adam(part.parameters(), lr=0.01, betas=(0.5, 0.9)) for part in model.children()]
    return Setup(model, optimizers, loss)


def one_of_two_gan_optimizers() -> Setup:
    """The losses are separate and each optimizer has its own step."""
    setup = gan()
    model: Any = setup.model
    maker, critic = setup.optimizers

    def step() -> None:
        critic.zero_grad()
        model.critic(model.maker(torch.randn(4, 4)).detach()).mean().backward()
        critic.step()
        maker.zero_grad()
        model(torch.randn(4, 4)).mean().backward()
        maker.step()

    return Setup(model, [maker, critic], setup.loss, None, step)


def muon_and_adamw() -> Setup:
    require(torch.optim, "Muon")
    model = Forward(lambda self, x: self.head(self.layers(self.embed(x))), embed=nn.Embedding(7, 4),
                    layers=nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), head=nn.Linear(4, 3))  # fmt: skip
    others = [pair for pair in model.named_parameters() if pair[0] != "layers.0.weight"]
    muon = torch.optim.Muon([("layers.0.weight", model.layers[0].weight)], lr=0.01)  # type: ignore[index,union-attr]
    return Setup(model, [muon, AdamW(others, lr=0.01)], tokens)


def mixture_of_experts() -> Setup:
    """Two of four experts get no token."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        gate = self.router(x).softmax(-1)
        return self.head(gate[:, :1] * self.experts[0](x) + gate[:, 1:2] * self.experts[1](x))

    return plain(Forward(forward, router=nn.Linear(4, 4), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(4)),
                         head=nn.Linear(4, 2)))  # fmt: skip


def gradual_unfreezing() -> Setup:
    model = body()
    model[:5].requires_grad_(requires_grad=False)
    setup = Setup(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), square)
    setup.train()
    model[3].requires_grad_()
    rebind(setup.optimizers, model, add_missing={"lr": 0.001})
    setup.train()
    model.requires_grad_()
    rebind(setup.optimizers, model, add_missing={"lr": 0.0001})
    return setup


def swa() -> Setup:
    model = body()
    average = swa_utils.AveragedModel(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)

    def step() -> None:
        setup._usual_step()
        average.update_parameters(model)

    setup = Setup(model, optimizer, square, scheduler)
    return Setup(model, optimizer, square, scheduler, step)


def ema_inside() -> Setup:
    """The teacher is a frozen copy inside the model, without a gradient."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x) - target

    student = body()
    model = Forward(forward, student=student, teacher=copy.deepcopy(student).eval().requires_grad_(requires_grad=False))
    setup = plain(model)

    def step() -> None:
        setup._usual_step()
        with torch.no_grad():
            for slow, fast in zip(model.teacher.parameters(), student.parameters(), strict=True):  # type: ignore[union-attr]
                slow.lerp_(fast, 0.1)

    def loss(model: Any) -> torch.Tensor:
        value: torch.Tensor = (model(torch.randn(4, 4)) + 1).square().mean()
        return value

    setup = Setup(model, setup.optimizers, loss)
    return Setup(model, setup.optimizers, loss, None, step)


def ema_average() -> Setup:
    average = swa_utils.AveragedModel(body(), avg_fn=lambda slow, fast, _: slow.lerp(fast, 0.1))
    return Setup(average.module, AdamW(average.module.parameters(), lr=0.01), square)


def frozen_batch_norm() -> Setup:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[:2].requires_grad_(requires_grad=False)
    model[:2].eval()
    return Setup(model, AdamW(model[2].parameters(), lr=0.01), square)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer(self.embed(x)))
        return out


def float_norms() -> Setup:
    """The matrices are frozen in bfloat16, and the norm trains in float32."""
    first, last = (nn.Linear(4, 4).bfloat16().requires_grad_(requires_grad=False) for _ in range(2))
    return plain(Forward(lambda self, x: self.last(self.norm(self.first(x.bfloat16()).float()).bfloat16()),
                         first=first, norm=nn.LayerNorm(4), last=last))  # fmt: skip


def keeps_outputs() -> Setup:
    """The forward pass keeps tensors of the graph, which torch cannot copy."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        self.hidden = self.first(x)
        self.outputs = [self.head(self.hidden)]
        self.named = {"last": self.outputs}
        return self.outputs[0]

    return plain(Forward(forward, first=nn.Linear(4, 4), head=nn.Linear(4, 2)))


def empty_parameter() -> Setup:
    """A layer without outputs, as where a width is the difference of two sizes, has a gradient without numbers."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        return torch.cat([self.layer(x), self.empty(x)], 1)

    empty = nn.Linear(4, 1, bias=False)
    empty.weight = nn.Parameter(torch.zeros(0, 4))
    return plain(Forward(forward, layer=nn.Linear(4, 4), empty=empty))


def checkpointed(*, reentrant: bool) -> Setup:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.head(checkpoint(self.layer, self.first(x), use_reentrant=reentrant))

    return plain(Forward(forward, first=nn.Linear(4, 4), layer=nn.Linear(4, 4), head=nn.Linear(4, 2)))


def lora() -> Setup:
    base = nn.Linear(4, 4).requires_grad_(requires_grad=False)
    model = Forward(lambda self, x: self.base(x) + self.lora_b(self.lora_a(x)), base=base,
                    lora_a=nn.Linear(4, 2, bias=False), lora_b=nn.Linear(2, 4, bias=False))  # fmt: skip
    nn.init.zeros_(model.lora_b.weight)  # type: ignore[arg-type,union-attr]
    return plain(model)


def layer_decay() -> Setup:
    model = body()
    groups = [{"params": [*part.parameters()], "lr": 0.01 * 0.8**i} for i, part in enumerate(reversed(model))]
    optimizer = AdamW([group for group in groups if group["params"]])
    return Setup(model, optimizer, square, lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step))


def warm_up() -> Setup:
    model = body()
    optimizer = AdamW(split_by_decay(model), lr=0.01)
    return Setup(model, optimizer, square, lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10)))


def sequential_warm_up() -> Setup:
    model = body()
    optimizer = AdamW(split_by_decay(model), lr=0.01)
    parts = [lr_scheduler.LinearLR(optimizer, 0.01, total_iters=1), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return Setup(model, optimizer, square, lr_scheduler.SequentialLR(optimizer, parts, [1]))


def one_cycle() -> Setup:
    model = body()
    optimizer = AdamW(split_by_decay(model), lr=0.01)
    return Setup(model, optimizer, square, lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10))


def plateau() -> Setup:
    model = body()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)

    def step() -> None:
        setup._usual_step()
        scheduler.step(1.0)

    setup = Setup(model, optimizer, square)
    return Setup(model, optimizer, square, scheduler, step)


def autocast(*, scaled: bool) -> Setup:
    model = body()
    optimizer = AdamW(split_by_decay(model), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)

    def loss(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return square(model)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(loss(model)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()

    return Setup(model, optimizer, loss, None, step)


def wrapped(wrap: Callable[[nn.Module], Any]) -> Setup:
    model = body()
    return Setup(wrap(model), AdamW(split_by_decay(model), lr=0.01), square)


def channels_last(*, fused: bool) -> Setup:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model.to(memory_format=torch.channels_last)
    optimizer = AdamW(split_by_decay(model), lr=0.01, fused=fused, foreach=False)
    return Setup(model, optimizer, lambda model: square(model, 2, 3, 5, 5))


def sparse_embedding() -> Setup:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2))
    optimizers = [torch.optim.SparseAdam(model[0].parameters(), lr=0.01), AdamW(model[1].parameters(), lr=0.01)]
    return Setup(model, optimizers, tokens)


def lbfgs() -> Setup:
    model = body()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    x = torch.randn(4, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return Setup(model, optimizer, square, None, lambda: optimizer.step(closure))


def parameter_list() -> Setup:
    def forward(self: Any, x: torch.Tensor) -> Any:
        for weight in self.weights:
            x = x @ weight
        return x * self.named["scale"]

    weights = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(12))
    return plain(Forward(forward, weights=weights, named=nn.ParameterDict({"scale": nn.Parameter(torch.ones(4))})))


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


def parametrized() -> Setup:
    model = body()
    parametrize.register_parametrization(model[3], "weight", Half())
    return plain(model)


def frozen_embedding() -> Setup:
    model = nn.Sequential(nn.Embedding(7, 4).requires_grad_(requires_grad=False), nn.Linear(4, 4), nn.Linear(4, 2))
    return plain(model, tokens)


def siamese() -> Setup:
    model = body()

    def loss(model: Any) -> Any:
        value: torch.Tensor = (model(torch.randn(4, 4)) - 2 * model(torch.randn(4, 4))).square().mean()
        return value + model(torch.randn(4, 4)).square().mean()

    return plain(model, loss)


def complex_model() -> Setup:
    model = Forward(lambda self, x: (x.to(torch.complex64) @ self.weight).abs(),
                    weight=nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)))  # fmt: skip
    return plain(model)


def unused_buffers() -> Setup:
    model = body()
    model.register_buffer("positions", torch.arange(9))
    model.register_buffer("cache", torch.zeros(3, 3), persistent=False)
    model.register_buffer("absent", None)
    return plain(model)


def rnn(kind: Any, **options: Any) -> Setup:
    return plain(kind(4, 3, num_layers=2, batch_first=True, **options), lambda model: square(model, 2, 5, 4))


def transformer_layers() -> Setup:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return plain(model, lambda model: square(model.train(), 2, 5, 8))


def prompt_tuning() -> Setup:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.base(torch.cat([self.prompt.expand(len(x), -1, -1), x], 1))

    prompt = nn.Parameter(torch.zeros(1, 2, 4))
    model = Forward(forward, base=body().requires_grad_(requires_grad=False), prompt=prompt)
    return Setup(model, AdamW([prompt], lr=0.01, weight_decay=0.0), lambda model: square(model, 3, 5, 4))


def rezero() -> Setup:
    """A residual gate starts at 0, so that its branch has a zero gradient at the first step."""
    return plain(Forward(lambda self, x: x + self.gate * self.layer(x), gate=nn.Parameter(torch.zeros(1)),
                         layer=nn.Linear(4, 4)))  # fmt: skip


def resumed() -> Setup:
    first = warm_up()
    first.train()
    second = warm_up()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizers.load_state_dict(first.optimizers.state_dict())
    second.schedulers.load_state_dict(first.schedulers.state_dict())
    return second


SETUPS: dict[str, Callable[[], Setup]] = {
    "a GAN with one loss": gan,
    "a GAN with two losses": one_of_two_gan_optimizers,
    "Muon and AdamW": muon_and_adamw,
    "a mixture of experts with unused experts": mixture_of_experts,
    "gradual unfreezing": gradual_unfreezing,
    "SWA": swa,
    "an EMA teacher in the model": ema_inside,
    "an EMA model trained on": ema_average,
    "a frozen BatchNorm in eval mode": frozen_batch_norm,
    "BatchNorm trained": lambda: plain(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))),
    "BatchNorm without affine": lambda: plain(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))),
    "InstanceNorm and GroupNorm": lambda: plain(
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 3)),
        lambda model: square(model, 2, 4, 6),
    ),
    "a tied head": lambda: plain(Tied(), tokens),
    "float32 norms in a bfloat16 model": float_norms,
    "a model that keeps its outputs": keeps_outputs,
    "a parameter without numbers": empty_parameter,
    "gradient checkpointing": lambda: checkpointed(reentrant=False),
    "reentrant gradient checkpointing": lambda: checkpointed(reentrant=True),
    "LoRA": lora,
    "prompt tuning": prompt_tuning,
    "a residual gate that starts at 0": rezero,
    "a layer-wise rate": layer_decay,
    "a warm-up from 0": warm_up,
    "a warm-up and cosine": sequential_warm_up,
    "OneCycleLR": one_cycle,
    "ReduceLROnPlateau": plateau,
    "a resumed run": resumed,
    "autocast": lambda: autocast(scaled=False),
    "a GradScaler": lambda: autocast(scaled=True),
    "DataParallel": lambda: wrapped(nn.DataParallel),
    "a wrapper with the attribute module": lambda: wrapped(
        lambda model: Forward(lambda self, x: self.module(x), module=model)
    ),
    "torch.compile": lambda: wrapped(lambda model: torch.compile(model, backend="eager")),
    "channels_last": lambda: channels_last(fused=False),
    "channels_last and a fused optimizer": lambda: channels_last(fused=True),
    "a sparse embedding": sparse_embedding,
    "LBFGS": lbfgs,
    "parameter lists": parameter_list,
    "weight_norm": lambda: plain(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))),
    "the old weight_norm": lambda: plain(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))),
    "the old spectral_norm": lambda: plain(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))),
    "spectral_norm": lambda: plain(nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))),
    "orthogonal": lambda: plain(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))),
    "a parametrization": parametrized,
    "a frozen embedding": frozen_embedding,
    "an embedding with padding": lambda: plain(
        nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 2)), tokens
    ),
    "a siamese model": siamese,
    "dropout": lambda: plain(nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 2))),
    "an LSTM": lambda: rnn(nn.LSTM, bidirectional=True),
    "a GRU": lambda: rnn(nn.GRU),
    "an RNN": lambda: rnn(nn.RNN),
    "a transformer encoder": transformer_layers,
    "attention": lambda: plain(
        Forward(lambda self, x: self.attend(x, x, x)[0], attend=nn.MultiheadAttention(4, 2)),
        lambda model: square(model, 5, 2, 4),
    ),
    "unused buffers": unused_buffers,
    "complex parameters": complex_model,
    "a model in eval mode without dropout and BatchNorm": lambda: plain(body().eval()),
    "a lazy layer after its first forward pass": lambda: plain(initialized(nn.Sequential(nn.LazyLinear(4), nn.Tanh()))),
    "Adafactor": lambda: with_optimizer(adafactor),
    "a tensor as lr": lambda: with_optimizer(lambda parameters: AdamW(parameters, lr=torch.tensor(0.01))),
    "foreach": lambda: with_optimizer(lambda parameters: AdamW(parameters, lr=0.01, foreach=True)),
    "momentum": lambda: with_optimizer(lambda parameters: SGD(parameters, lr=0.01, nesterov=True, momentum=0.9)),
}


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    require(torch.optim, "Adafactor")
    return torch.optim.Adafactor(parameters, lr=0.01)


def initialized(model: nn.Module) -> nn.Module:
    model(torch.randn(4, 4))
    return model


def with_optimizer(make: Callable[[Any], Any]) -> Setup:
    model = body()
    return Setup(model, make(model.named_parameters()), square)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::UserWarning:torch")
@pytest.mark.parametrize("name", SETUPS)
def test_a_healthy_set_up_gets_no_finding_above_a_note(name: str) -> None:
    """``validate_param_groups``, ``assert_param_groups(strict=True)`` and ``preflight`` agree that all is well."""
    torch.manual_seed(0)
    assert loud_findings(SETUPS[name]()) == []
