"""The demo model's clips: drawing, captions, held-out combinations, and the OpenCV judge on drawn
clips.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines" / "demo_model"))

import blob_check
import clips


def all_scenes():
    """One scene per (colour, shape, direction), the other words cycling."""
    scenes = []
    for colour in clips.COLOURS:
        for shape in clips.SHAPES:
            for direction in clips.DIRECTIONS:
                i = len(scenes)
                scenes.append(
                    clips.Scene(
                        colour,
                        shape,
                        list(clips.SIZES)[i % 2],
                        direction,
                        clips.TEXTURES[(i // 2) % len(clips.TEXTURES)],
                        list(clips.TINTS)[(i // 3) % len(clips.TINTS)],
                    )
                )
    return scenes


@pytest.mark.parametrize(
    "size",
    [(21, 96, 96), (9, 32, 32), (9, 32, 64), (13, 48, 40)],
    ids=["default", "small", "wide", "odd"],
)
def test_judge_finds_colour_and_direction_of_every_drawn_combination(size):
    rng = np.random.default_rng(0)
    for scene in all_scenes():
        verdict = blob_check.judge(clips.draw_clip(scene, *size, rng))
        assert (verdict.colour, verdict.direction) == (scene.colour, scene.direction), scene
        assert verdict.frames_with_blob == size[0]


def test_judge_rejects_a_background_without_object_and_a_still_object():
    rng = np.random.default_rng(1)
    scene = clips.sample_scene(rng)
    clip = clips.draw_clip(scene, 21, 96, 96, rng)
    still = np.repeat(clip[:1], 21, axis=0)
    assert blob_check.judge(still).direction is None
    background = clips.draw_background(scene, 96, 96, rng)[None].repeat(21, axis=0)
    assert blob_check.judge(background).colour is None


@pytest.mark.parametrize("played", ["backwards", "turned"])
def test_judge_follows_the_motion_not_the_caption(played):
    rng = np.random.default_rng(2)
    scene = clips.Scene("red", "circle", "small", "left", "cloudy", "grey")
    clip = clips.draw_clip(scene, 21, 96, 96, rng)
    clip = clip[::-1] if played == "backwards" else np.rot90(clip, axes=(1, 2))
    assert blob_check.judge(clip).direction == {"backwards": "right", "turned": "down"}[played]


def test_object_stays_inside_and_moves_at_constant_velocity():
    rng = np.random.default_rng(3)
    for scene in all_scenes()[:48]:
        radius = clips.SIZES[scene.size][1]
        track = clips.trajectory(scene, radius, 21, 96, 96, rng)
        assert track.min() >= radius and track.max() <= 96 - radius
        steps = np.diff(track, axis=0)
        np.testing.assert_allclose(steps, steps[:1].repeat(20, axis=0), atol=1e-5)


def test_clip_is_the_same_for_the_same_seed_and_moves():
    scene = clips.sample_scene(np.random.default_rng(4))
    first = clips.draw_clip(scene, 9, 48, 32, np.random.default_rng(5))
    again = clips.draw_clip(scene, 9, 48, 32, np.random.default_rng(5))
    assert first.dtype == np.uint8 and first.shape == (9, 48, 32, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[-1])


def test_training_never_draws_a_held_out_combination():
    rng = np.random.default_rng(6)
    assert not any(clips.sample_scene(rng).held_out for _ in range(500))
    assert all(clips.sample_scene(rng, held_out=True).held_out for _ in range(50))


def test_held_out_set_is_a_sixth_and_leaves_every_pair_of_words_in_training():
    held = [scene for scene in all_scenes() if scene.held_out]
    assert len(held) == 24
    kept = [scene for scene in all_scenes() if not scene.held_out]
    assert len({(s.colour, s.direction) for s in kept}) == len(clips.COLOURS) * len(
        clips.DIRECTIONS
    )
    assert len({(s.shape, s.direction) for s in kept}) == len(clips.SHAPES) * len(clips.DIRECTIONS)
    assert len({(s.colour, s.shape) for s in kept}) == len(clips.COLOURS) * len(clips.SHAPES)


def test_fixed_prompts_are_forty_different_half_held_out_and_stable():
    prompts = clips.fixed_prompts()
    assert len({prompt for prompt, _, _ in prompts}) == 40
    assert sum(scene.held_out for _, scene, _ in prompts) == 20
    assert prompts == clips.fixed_prompts()
    assert set(Counter(scene.direction for _, scene, _ in prompts)) == set(clips.DIRECTIONS)


def test_captions_stay_in_the_vocabulary_and_vary():
    rng = np.random.default_rng(7)
    words = set(clips.vocabulary())
    scene = clips.sample_scene(rng)
    captions = {clips.caption(scene, rng) for _ in range(200)}
    assert len(captions) > 10
    for text in captions:
        assert set(text.replace(",", " , ").split()) <= words
        assert scene.colour in text and scene.shape in text


def test_an_object_larger_than_the_canvas_is_refused():
    scene = clips.Scene("red", "circle", "large", "left", "cloudy", "grey")
    with pytest.raises(ValueError, match="larger canvas"):
        clips.draw_clip(scene, 9, 16, 16, np.random.default_rng(0))


def test_training_forward_equals_the_stock_pipeline_forward():
    """One pad with a ln(count) bias against the pipeline's many zero pads, for any length."""
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("model")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer()
    text_encoder = model.build_text_encoder(len(tokenizer)).eval()
    transformer = model.build_transformer(latent_channels=8).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pipeline = diffusers.WanPipeline(
        tokenizer,
        text_encoder,
        vae=None,
        scheduler=model.build_scheduler(),
        transformer=transformer,
    )
    rng = np.random.default_rng(8)
    captions = [clips.caption(clips.sample_scene(rng), rng) for _ in range(3)] + [""]
    latents, timestep = torch.randn(4, 8, 3, 5, 6), torch.tensor([10.0, 500.0, 900.0, 30.0])
    with torch.no_grad():
        expected = {}
        for padded_length in (64, 512):
            text, _ = pipeline.encode_prompt(
                captions, do_classifier_free_guidance=False, max_sequence_length=padded_length
            )
            expected[padded_length] = transformer(latents, timestep, text).sample
        processor = model.use_padded_cross_attention(transformer)
        for block in transformer.blocks:
            block.attn1.set_processor(model.PairRotationAttention())
        text = model.embed_captions(text_encoder, tokenizer, captions)
        for padded_length, stock in expected.items():
            processor.set_pad_count(
                text.shape[1], padded_length - text.shape[1] + 1, latents.device
            )
            trained = transformer(latents, timestep, text).sample
            assert (trained - stock).abs().max() < 1e-4 * stock.std()
    assert (expected[64] - expected[512]).abs().max() > 1e-3 * expected[64].std()


def test_autoencoder_keeps_the_frame_count_and_compresses_four_by_four_by_two():
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    train_vae = pytest.importorskip("train_vae")
    vae = train_vae.build_vae().eval()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 21, 16, 32)).latent_dist.mode()
        assert latents.shape == (1, train_vae.LATENT_CHANNELS, 11, 4, 8)
        assert vae.decode(latents).sample.shape == (1, 3, 21, 16, 32)
