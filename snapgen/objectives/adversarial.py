"""Step distillation with a discriminator on the teacher's tokens (LADD, arXiv 2403.12015; SnapGen, section 4).

The student's one-step estimate x̂₀ = x_t − t·v_θ and the real latents are noised again and passed through the frozen
teacher. Small heads on the teacher's tokens learn to tell the two apart, and their gradient trains the student.
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
from snapgen.objectives.flow_matching import FlowMatchingObjective, batch_means
from snapgen.objectives.teacher import Teacher
from snapgen.training.batches import Batch, StepRandom

if TYPE_CHECKING:
    from snapgen.conditioning.captions import Conditioning
    from snapgen.training.settings import DistillationConfig
    from snapgen.training.stages import AdversarialConfig

MAX_HEAD_DIM = 256
"""Hidden channels of a discriminator head, at most. This number and the head's layers are our choice."""
NUM_HEADS = 4
"""Teacher blocks with a head by default, if the teacher has as many."""


class DiscriminatorHead(nn.Sequential):
    """Scores tokens as real or generated: (B, width, h, w) → (B, 1, h, w). The tokens already contain caption and t.

    The last layer starts at zero, so that the student gets no adversarial gradient before the head has learned.
    """

    def __init__(self, width: int) -> None:
        hidden = min(width, MAX_HEAD_DIM)
        last = nn.Conv2d(hidden, 1, 1)
        super().__init__(
            nn.Conv2d(width, hidden, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.LeakyReLU(0.2),
            last,
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))


class FeatureDiscriminator(nn.Module):
    """A frozen teacher with a trained head on the tokens of each chosen block.

    Args:
        teacher: frozen; neither copied nor moved, so it must be on the batches' device.
        adversarial: the blocks, and the timesteps at which images are noised again.
        seed: seed of the heads' weights.

    Raises:
        InputError: if the teacher does not have one of the blocks.
    """

    def __init__(self, teacher: Teacher, adversarial: AdversarialConfig, *, seed: int = 0) -> None:
        super().__init__()
        assert not any(weight.requires_grad for weight in teacher.parameters())
        self._teacher, self._renoise_mean_std = (teacher,), adversarial.renoise_mean_std
        self.blocks = evenly_spaced(teacher.num_layers) if adversarial.blocks is None else adversarial.blocks
        missing = [block for block in self.blocks if not 0 <= block < teacher.num_layers]
        if missing:
            problem = f"has blocks 0 to {teacher.num_layers - 1}, but adversarial.blocks names {missing[0]}"
            raise InputError(teacher.source, problem, "name other blocks, or leave adversarial.blocks out")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(seed, "critic"))
            self.heads = nn.ModuleList(DiscriminatorHead(teacher.hidden_dim) for _ in self.blocks)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits of every head at every token, above 0 for real: (B, logits) float32."""
        with torch.autocast(tokens[0].device.type, enabled=False):
            # per head (B, 1, h, w) → (B, h·w), joined over the heads
            return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, tokens, strict=True)], 1)

    def teacher_tokens(self, latents: Tensor, condition: Conditioning, random: StepRandom, name: str) -> list[Tensor]:
        """The teacher's tokens of latents that are noised again, as inputs of the heads.

        Each token is normalized to mean 0 and variance 1 over its channels, so that the gradient penalty does not
        depend on the teacher's scale.

        Args:
            latents: (n·B, C, H, W), n versions of the batch's B images one after the other. All versions of an image
                share timestep and noise (our choice), so that they differ in nothing but the image.
            condition: (B, …).
            random: the source of timesteps and noise.
            name: prefix of the names under which they are drawn.

        Returns:
            (n·B, width, h, w) float32 for each block.
        """
        (teacher,) = self._teacher
        versions = len(latents) // len(random.rows)
        quantile = random.quantiles(f"{name} t", latents.device)
        t = rectified_flow.logit_normal(quantile, *self._renoise_mean_std).repeat(versions)  # (B,) → (n·B,)
        noise = random.noise(f"{name} noise", latents).repeat(versions, 1, 1, 1)
        context = condition.context.repeat(versions, 1, 1)
        pooled = None if condition.pooled is None else condition.pooled.repeat(versions, 1)
        x = rectified_flow.interpolate(latents, noise, t)
        _, tokens = teacher.forward_features(x, t, condition._replace(context=context, pooled=pooled), self.blocks)
        return [_normalize_channels(x.float()) for x in tokens]


class AdversarialObjective(FlowMatchingObjective):
    """Trains the student to pass for real, in addition to `FlowMatchingObjective`; the discriminator is not trained.

    The batch's timesteps are those that the student's sampler visits.

    Args:
        discriminator: judges x̂₀.
        adversarial: the weight of the adversarial loss.
        others: see `FlowMatchingObjective`.
    """

    def __init__(
        self,
        student: UNet,
        *,
        discriminator: FeatureDiscriminator,
        adversarial: AdversarialConfig,
        prediction: rectified_flow.FlowPredictionType,
        distillation: DistillationConfig | None = None,
        teacher: Teacher | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, prediction=prediction, distillation=distillation, teacher=teacher, seed=seed)
        self._discriminator, self._weight = (discriminator,), adversarial.weight
        self._last: tuple[StepRandom, Tensor] | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of `FlowMatchingObjective`, ``adversarial``, and ``balance``: the norm of the weighted adversarial
        gradient at x̂₀ over that of all other losses."""
        result = self.student_pass(batch)
        t = batch.t.view(-1, 1, 1, 1)
        x0 = result.sample - t * result.velocity  # x̂₀ = x_t − t·v_θ
        other_loss = result.loss.mean()
        adversarial, x0_grad = self._adversarial_grad(x0.detach(), batch)
        (velocity_grad,) = torch.autograd.grad(other_loss, result.velocity, retain_graph=True)
        # ∂x̂₀/∂v = −t, so the other losses' gradient at x̂₀ has the norm of ∂loss/∂v / t
        other_norm = (velocity_grad / t).norm()
        balance = self._weight * x0_grad.norm() / other_norm.clamp(min=torch.finfo(x0_grad.dtype).tiny)
        self._last = batch.random, x0.detach()
        # The discriminator's graph ends at x̂₀. Its gradient there is taken first, which frees the teacher's
        # activations, and is then passed on: the sum has the value 0 and the gradient x0_grad with regard to x̂₀.
        surrogate = adversarial + (x0_grad * (x0 - x0.detach())).sum()
        logged = {"adversarial": adversarial, "balance": balance, **batch_means(result.terms)}
        return {"loss": other_loss + self._weight * surrogate, **logged}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile only the student: `forward` takes a gradient halfway, which a compiled graph does not allow."""
        self.student.compile(*args, **kwargs)

    def last_x0(self, batch: Batch) -> Tensor:
        """The detached x̂₀ (B, C, H, W) of the last forward pass, which must have been on ``batch``."""
        assert self._last is not None
        random, x0 = self._last
        assert random == batch.random, "the discriminator is trained on the batch that the student was last trained on"
        return x0

    def _adversarial_grad(self, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The adversarial loss −mean(logits) and its gradient with regard to x̂₀ (B, C, H, W), both detached."""
        assert batch.teacher is not None, "the batches have no captions for the teacher"
        (discriminator,) = self._discriminator
        x0.requires_grad_()
        tokens = discriminator.teacher_tokens(x0, batch.teacher, batch.random, "student")
        loss = -discriminator(tokens).mean()  # the generator's side of the hinge loss
        (x0_grad,) = torch.autograd.grad(loss, x0)
        return loss.detach(), x0_grad


class DiscriminatorObjective(nn.Module):
    """Trains the discriminator's heads on the student's last x̂₀ against real latents: hinge loss and R1 penalty.

    R1 (arXiv 1801.04406) is taken at the heads' inputs as in ADD (arXiv 2311.17042): the squared gradient of a head's
    logits with regard to a real token, averaged over tokens and heads.

    Args:
        discriminator: its heads are trained.
        student: the objective that is trained before this one on the same batch.
        r1: weight of the penalty.
    """

    def __init__(self, discriminator: FeatureDiscriminator, student: AdversarialObjective, *, r1: float) -> None:
        super().__init__()
        self.critic, self._student, self._r1 = discriminator, (student,), r1  # "critic." is a prefix in checkpoints

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do not compile: R1 needs second derivatives, which compiled graphs do not have."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, the mean logits of ``real`` and ``fake`` images, and ``r1`` before it is weighted."""
        assert batch.teacher is not None, "the batches have no captions for the teacher"
        # (2·B, C, H, W): the real latents, then the student's
        real_and_fake = torch.cat([batch.latents, self._student[0].last_x0(batch)])
        with torch.no_grad():
            tokens = self.critic.teacher_tokens(real_and_fake, batch.teacher, batch.random, "critic")
        real_tokens = [x[: len(batch.latents)].requires_grad_() for x in tokens]
        real = self.critic(real_tokens)
        fake = self.critic([x[len(batch.latents) :] for x in tokens])
        gradients = torch.autograd.grad(real.sum(), real_tokens, create_graph=True)
        # Squared norm over the channels: (B, width, h, w) → (B, h, w), then the mean.
        r1 = torch.stack([gradient.square().sum(1).mean() for gradient in gradients]).mean()
        hinge = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
        logged = {"real": real.mean(), "fake": fake.mean(), "r1": r1}
        return {"loss": hinge + self._r1 * r1, **{name: value.detach() for name, value in logged.items()}}


def evenly_spaced(num_layers: int) -> tuple[int, ...]:
    """Evenly spaced block indices below ``num_layers``, at most `NUM_HEADS`, including the last."""
    count = min(NUM_HEADS, num_layers)
    return tuple((i + 1) * num_layers // count - 1 for i in range(count))


def _normalize_channels(tokens: Tensor) -> Tensor:
    """Layer norm over the channels of each position: (B, width, h, w) → (B, width, h, w)."""
    channels_last = tokens.movedim(1, -1)  # (B, width, h, w) -> (B, h, w, width)
    return functional.layer_norm(channels_last, channels_last.shape[-1:]).movedim(-1, 1)
