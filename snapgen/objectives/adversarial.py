"""Distillation to a few steps by a discriminator on the teacher's tokens (LADD, arXiv 2403.12015; SnapGen, section 4).

The student's one-step guess x̂₀ = x_t − t·v_θ and the real latents are noised again, the frozen teacher looks at both,
and small heads on its tokens tell them apart; the teacher's gradient leads the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from snapgen import seeding
from snapgen.diffusion import rectified_flow
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from snapgen.objectives.flow_matching import FlowMatchingObjective, means
from snapgen.objectives.teacher import Teacher
from snapgen.training.batches import Batch, StepRandom

if TYPE_CHECKING:
    from snapgen.conditioning.captions import Conditioning
    from snapgen.training.stages import AdversarialConfig, DistillationConfig

HEAD_WIDTH = 256
"""Channels inside a head, at most; our choice, as are its layers."""
HEADS = 4
"""Blocks that are looked at, if the teacher has as many and no others are named."""


class DiscriminatorHead(nn.Sequential):
    """Tells real tokens from made ones: (B, width, h, w) → (B, 1, h, w). The caption and t are in the tokens already.

    Its first answer is 0 everywhere: it pulls at the student only once it has learnt something.
    """

    def __init__(self, width: int) -> None:
        inside = min(width, HEAD_WIDTH)
        last = nn.Conv2d(inside, 1, 1)
        super().__init__(
            nn.Conv2d(width, inside, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(inside, inside, 3, padding=1),
            nn.LeakyReLU(0.2),
            last,
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))


class FeatureDiscriminator(nn.Module):
    """The discriminator: a frozen teacher's tokens after some blocks, a trained head on each.

    Args:
        teacher: frozen. Neither copied nor moved: it must be on the batches' device.
        adversarial: which blocks, and at which timesteps images are looked at.
        seed: of the heads' weights.

    Raises:
        InputError: if the teacher has no such blocks.
    """

    def __init__(self, teacher: Teacher, adversarial: AdversarialConfig, *, seed: int = 0) -> None:
        super().__init__()
        assert not any(weight.requires_grad for weight in teacher.parameters())
        self._teacher, self._noise = (teacher,), adversarial.noise
        self.blocks = evenly_spaced(teacher.depth) if adversarial.blocks is None else adversarial.blocks
        missing = [block for block in self.blocks if not 0 <= block < teacher.depth]
        if missing:
            problem = f"has blocks 0 to {teacher.depth - 1}, adversarial.blocks names {missing[0]}"
            raise InputError(teacher.source, problem, "name others, or leave blocks out")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(seed, "critic"))
            self.heads = nn.ModuleList(DiscriminatorHead(teacher.width) for _ in self.blocks)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Every head's answer at every token, above 0 for real: (B, answers) float32."""
        with torch.autocast(tokens[0].device.type, enabled=False):
            return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, tokens, strict=True)], 1)

    def look(self, latents: Tensor, condition: Conditioning, draws: StepRandom, name: str) -> list[Tensor]:
        """The teacher's tokens of latents that are noised again, for the heads.

        Each token is scaled to mean 0 and variance 1 over its channels, so that a penalty on the heads' gradient means
        the same whatever the teacher's scale.

        Args:
            latents: (n·B, C, H, W), n kinds of the batch's B images one behind the other; an image's kinds share
                timestep and noise (our choice: nothing else than the images themselves tells them apart).
            condition: (B, …).
            name: of the draws.

        Returns:
            (n·B, width, h, w) float32 for each block.
        """
        (teacher,) = self._teacher
        kinds = len(latents) // len(draws.rows)
        quantile = draws.quantiles(f"{name} t", latents.device)
        t = rectified_flow.logit_normal(quantile, *self._noise).repeat(kinds)
        noise = draws.noise(f"{name} noise", latents).repeat(kinds, 1, 1, 1)
        context = condition.context.repeat(kinds, 1, 1)
        pooled = None if condition.pooled is None else condition.pooled.repeat(kinds, 1)
        x = rectified_flow.interpolate(latents, noise, t)
        _, tokens = teacher.observe(x, t, condition._replace(context=context, pooled=pooled), self.blocks)
        return [_normalised(some.float()) for some in tokens]


class AdversarialObjective(FlowMatchingObjective):
    """The student learns to be taken for real, beside what `FlowMatchingObjective` teaches it.

    The batch's timesteps are those that its sampler will visit. The critic is used, not trained.

    Args:
        adversarial: how much it counts.
        others: as `FlowMatchingObjective`.
    """

    def __init__(
        self,
        student: UNet,
        *,
        critic: FeatureDiscriminator,
        adversarial: AdversarialConfig,
        prediction: rectified_flow.FlowPredictionType,
        distillation: DistillationConfig | None = None,
        teacher: Teacher | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, prediction=prediction, distillation=distillation, teacher=teacher, seed=seed)
        self._critic, self._weight = (critic,), adversarial.weight
        self._made: tuple[StepRandom, Tensor] | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """As `FlowMatchingObjective`, with ``adversarial``, and with ``balance``: how hard it pulls at x̂₀ over how
        hard the rest."""
        lesson = self.lesson(batch)
        t = batch.t.view(-1, 1, 1, 1)
        clean = lesson.sample - t * lesson.velocity
        rest = lesson.loss.mean()
        adversarial, pull = self._pull(clean.detach(), batch)
        (other,) = torch.autograd.grad(rest, lesson.velocity, retain_graph=True)  # ∂x̂₀ = −t·∂v
        balance = self._weight * pull.norm() / (other / t).norm().clamp(min=torch.finfo(pull.dtype).tiny)
        self._made = batch.draws, clean.detach()
        # The critic's graph ends at x̂₀, so its gradient is taken there first, which frees the teacher's activations.
        reached = adversarial + (pull * (clean - clean.detach())).sum()
        logged = {"adversarial": adversarial, "balance": balance, **means(lesson.parts)}
        return {"loss": rest + self._weight * reached, **logged}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the student alone: a compiled graph lets no gradient be taken halfway through the turn."""
        self.student.compile(*args, **kwargs)

    def made(self, batch: Batch) -> Tensor:
        """x̂₀ of the batch that was taken last, without its graph."""
        assert self._made is not None
        draws, clean = self._made
        assert draws == batch.draws, "the critic's turn follows on the student's with the same batch"
        return clean

    def _pull(self, clean: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The adversarial loss, −mean(answers), and its gradient at x̂₀; both without a graph."""
        assert batch.teacher is not None, "the feed gives the teacher's captions"
        (critic,) = self._critic
        clean.requires_grad_()
        loss = -critic(critic.look(clean, batch.teacher, batch.draws, "student")).mean()
        (pull,) = torch.autograd.grad(loss, clean)
        return loss.detach(), pull


class DiscriminatorObjective(nn.Module):
    """The critic's heads learn to tell the student's last x̂₀ from the real latents: hinge loss and R1.

    R1 (arXiv 1801.04406), taken at the heads' inputs as in ADD (arXiv 2311.17042): the squared gradient of a head's
    answers with regard to a real token, mean over tokens and heads.

    Args:
        critic: its heads are trained.
        student: whose turn comes before, with the same batch.
        r1: weight of the penalty.
    """

    def __init__(self, critic: FeatureDiscriminator, student: AdversarialObjective, *, r1: float) -> None:
        super().__init__()
        self.critic, self._student, self._r1 = critic, (student,), r1

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles nothing: R1 is differentiated twice, which compiled graphs are not."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, the mean answers to ``real`` and ``fake`` ones, and ``r1`` before its weight."""
        assert batch.teacher is not None, "the feed gives the teacher's captions"
        both = torch.cat([batch.latents, self._student[0].made(batch)])
        with torch.no_grad():
            tokens = self.critic.look(both, batch.teacher, batch.draws, "critic")
        seen = [some[: len(batch.latents)].requires_grad_() for some in tokens]
        real = self.critic(seen)
        fake = self.critic([some[len(batch.latents) :] for some in tokens])
        slopes = torch.autograd.grad(real.sum(), seen, create_graph=True)
        r1 = torch.stack([slope.square().sum(1).mean() for slope in slopes]).mean()
        hinge = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
        logged = {"real": real.mean(), "fake": fake.mean(), "r1": r1}
        return {"loss": hinge + self._r1 * r1, **{name: value.detach() for name, value in logged.items()}}


def build_adversarial_objectives(
    student: UNet,
    *,
    prediction: rectified_flow.FlowPredictionType,
    adversarial: AdversarialConfig,
    distillation: DistillationConfig | None,
    teacher: Teacher,
    seed: int,
) -> dict[str, nn.Module]:
    """The objective of step distillation: the student's turn, then the critic's."""
    critic = FeatureDiscriminator(teacher, adversarial, seed=seed)
    first = AdversarialObjective(
        student,
        critic=critic,
        adversarial=adversarial,
        prediction=prediction,
        distillation=distillation,
        teacher=None if distillation is None else teacher,
        seed=seed,
    )
    return {"student": first, "critic": DiscriminatorObjective(critic, first, r1=adversarial.r1)}


def evenly_spaced(depth: int) -> tuple[int, ...]:
    """At most `HEADS` of so many blocks, evenly spread, the last among them."""
    count = min(HEADS, depth)
    return tuple((i + 1) * depth // count - 1 for i in range(count))


def _normalised(tokens: Tensor) -> Tensor:
    """(B, width, h, w), each position over its channels."""
    last = tokens.movedim(1, -1)
    return functional.layer_norm(last, last.shape[-1:]).movedim(-1, 1)
