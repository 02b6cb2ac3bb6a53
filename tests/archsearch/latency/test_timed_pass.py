from __future__ import annotations

from typing import Any

from archsearch.latency.timed_pass import TimedPass

PROTOCOL = {"num_inference_steps": 10, "guidance_scale": 2.0, "resolution": 32}


def attrs(**changes: Any) -> dict[str, Any]:
    space = {"latent_size": 16, "context_tokens": 77}
    return {"space": space, "protocol": {"protocol": PROTOCOL}, "trained_latent_size": 8, **changes}


def test_a_latency_is_of_one_pass_and_an_image_of_several() -> None:
    timed = TimedPass.of_study(attrs())
    assert timed.text == "one pass of the U-Net at batch size 1, a latent of 16 × 16 (64 px) and 77 context tokens"
    assert timed.image(2.5) == (
        "an image of the protocol's 10 steps, two passes each for guidance 2 takes 20 passes, 50 ms, without text "
        "encoder and decoder"
    )
    unguided = TimedPass.of_study(attrs(protocol={"protocol": {**PROTOCOL, "guidance_scale": 1.0}}))
    assert unguided.image(2.5).startswith("an image of the protocol's 10 steps takes 10 passes, 25 ms")


def test_a_study_that_trains_at_another_latent_says_so() -> None:
    assert TimedPass.of_study(attrs()).mismatch == (
        "Candidates are trained at a latent of 8 × 8 (32 px), but cost and latency are those at 16 × 16: quality and "
        "latency are not of the same images."
    )
    space = {"latent_size": 128, "context_tokens": 77, "proxy": {"name": "small"}}
    assert TimedPass.of_study(attrs(space=space)).mismatch.startswith("Twins in small are trained at")
    assert TimedPass.of_study(attrs(trained_latent_size=16)).mismatch == ""


def test_studies_that_train_nothing_or_are_older_have_no_image() -> None:
    plain = TimedPass.of_study({"space": {"latent_size": 16, "context_tokens": 77}, "protocol": {}})
    assert plain.text == "one pass of the U-Net at batch size 1, a latent of 16 × 16 and 77 context tokens"
    assert (plain.image(1), plain.mismatch) == ("", "")
