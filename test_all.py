"""Everything the project promises, checked against something it did not write: closed forms, brute force, pycocotools,
and, where installed, diffusers, transformers and scipy. Real samples are read from the folder that the environment
variable SEGGEN_TEST_DATA names; without it their tests skip.

    pytest test_all.py
"""
import ast
import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import diffusion
import mask2former as m2f
import text2mask
import train as T
import unet as nets
from text2mask import clean, components, decode, encode, grow, outlined, palette, segments


# ======================================== The codec, the process, both syntheses, the promises about the files

REPO = Path(__file__).resolve().parent
FILES = ("unet", "diffusion", "text2mask", "mask2img", "masksyn", "imgsyn", "mask2former", "train")


def script(*args, ok=True, cwd=None, **environment):
    """Runs a script of the project; a failure must be one line and not a traceback."""
    run = subprocess.run([sys.executable, *map(str, args)], cwd=cwd or REPO, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(REPO), **environment})
    if ok:
        assert run.returncode == 0, run.stderr[-2000:]
    else:
        assert run.returncode != 0 and "Traceback" not in run.stderr, run.stderr[-2000:]
    return run


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---- the mask codec ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 2, 6, 13, 25, 62, 133, 150, 214])
def test_codec_round_trip(K):
    ids = np.random.default_rng(K).integers(0, K + 1, (40, 50)).astype(np.uint8)
    assert len({tuple(c) for c in palette(K).tolist()}) == K + 2
    assert (decode(encode(ids, K), K) == ids).all()
    noisy = np.clip(encode(ids, K).astype(int) + np.random.default_rng(0).integers(-9, 10, (40, 50, 3)), 0, 255)
    assert (decode(noisy.astype(np.uint8), K) == ids).all()


def test_palette_is_the_published_one():
    assert palette(150)[[1, 2, 6]].tolist() == [[0, 0, 51], [0, 0, 102], [51, 0, 0]]       # wall, building, ceiling


def test_decode_gives_ambiguous_pixels_to_void():
    middle = (palette(150)[1].astype(int) + palette(150)[2]) // 2
    assert decode(np.full((2, 2, 3), middle, np.uint8), 150).max() == 0


def test_components_equal_a_flood_fill():
    rng = np.random.default_rng(0)
    for _ in range(30):
        values = rng.integers(0, 3, rng.integers(1, 13, 2))
        label, seen = components(values), np.full(values.shape, -1)
        for start in np.ndindex(values.shape):
            stack = [start] if seen[start] < 0 else []
            while stack:
                i, j = at = stack.pop()
                if seen[at] < 0 and values[at] == values[start]:
                    seen[at] = start[0] * values.shape[1] + start[1]
                    stack += [(a, b) for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
                              if 0 <= a < values.shape[0] and 0 <= b < values.shape[1]]
        assert (label == seen).all()


def test_clean_removes_specks_and_keeps_the_rest():
    ids = np.ones((20, 20), np.uint8)
    ids[:, 10:] = 2
    truth = ids.copy()
    ids[3:5, 3:5], ids[15, 15] = 3, 0
    assert (clean(ids, 8) == truth).all() and (clean(ids, 4)[3:5, 3:5] == 3).all()
    assert (grow(np.zeros((3, 3), bool), truth[:3, :3])[0] == truth[:3, :3]).all()       # nothing known: as it was


def test_instances_come_back_from_their_outlines():
    ids, instances = np.ones((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
    ids[8:20, 4:28], instances[8:20, 4:16], instances[8:20, 16:28] = 2, 1, 2             # two touching things
    back, found = segments(outlined(ids, instances, 2), [False, True])
    assert (back == ids).mean() > 0.9 and found.max() == 2
    assert len({(a, b) for a, b in zip(instances[10:18, 6:26].ravel(), found[10:18, 6:26].ravel())}) <= 4
    assert segments(ids, [False, True])[1].max() == 1                                    # without edges they are one


def large_pair(root, size=(480, 640)):
    """A pair folder of one photo of (H, W), larger than it is trained at: two things that touch, on stuff."""
    ids, instances = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    ids[160:400, 100:541], instances[160:400, 100:320], instances[160:400, 320:541] = 2, 1, 2
    for part, picture in (("masks", ids), ("instances", instances), ("images", np.stack([90 * ids] * 3, -1))):
        (root / part).mkdir(parents=True)
        Image.fromarray(picture).save(root / part / "a.png")
    (root / "classes.json").write_text('[{"name": "sky", "isthing": false}, {"name": "ball", "isthing": true}]')
    return root


@pytest.mark.parametrize("size", [(64, 64), (72, 96), (256, 256), (768, 768)])
def test_generators_train_on_the_outlines_that_synthesis_draws(tmp_path, size):
    import imgsyn
    pairs = text2mask.Pairs(large_pair(tmp_path), size, lambda captions: torch.zeros(1, 4), edges=True, augment=False)
    codes = pairs[0, 0]["codes"].numpy()
    assert (codes == outlined(*imgsyn.read_mask(tmp_path, "a", 2, size), 2)).all()
    assert segments(codes.astype(np.uint8), [False, True])[1].max() == 2


def test_photos_shrink_by_the_mean_and_grow_smoothly():
    ramp = np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[None], 8, 0)                  # 8 grey levels, 8 x 8
    photo, mask = Image.fromarray(np.stack([ramp] * 3, -1)), Image.fromarray(ramp)
    half, double = text2mask.placed((8, 8), (4, 4), None)[0], text2mask.placed((8, 8), (16, 16), None)[0]
    assert np.asarray(half(photo))[0, :, 0].tolist() == [16, 80, 144, 208]
    grown = np.asarray(double(photo))[0, 2:-2, 0].astype(int)
    assert len(set(grown)) == len(grown) and (np.diff(grown) > 0).all()                  # no steps of two equal pixels
    assert set(np.unique(double(mask))) == set(np.unique(half(mask))) | set(np.unique(ramp))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_grey_of_16_bits_is_scaled_not_clipped(mode):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey.astype(np.int32))
    assert image.mode == mode
    for read in (text2mask.rgb, m2f.rgb):
        assert (np.asarray(read(image)) == (grey >> 8)[..., None]).all()


def test_a_negative_id_is_told_in_one_line(tmp_path):
    Image.fromarray(np.full((4, 4), -1, np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(SystemExit, match="looked for ids of 0 to 3, found class id -1"):
        text2mask.read_ids(tmp_path / "a.tiff", 3)


@pytest.mark.parametrize("classes, words", [
    ('[{"name": null}]', "found .None, False."), ('[{"name": "a", "isthing": "no"}]', "found .'a', 'no'."), ("[[1]]", "TypeError"),
    ("{", "JSONDecodeError")])
def test_both_readers_of_classes_refuse_the_same(tmp_path, classes, words):
    (tmp_path / "classes.json").write_text(classes)
    with pytest.raises(SystemExit, match=words):
        text2mask.read_classes(tmp_path)
    with pytest.raises(T.BadInput, match="classes.json: looked for a list"):
        T.read_classes(tmp_path)
    (tmp_path / "classes.json").write_text('[{"name": "a"}]')
    assert text2mask.read_classes(tmp_path) == T.read_classes(tmp_path) == [{"name": "a", "isthing": False}]


@pytest.mark.parametrize("text", ["{", "[]", '{"sky": 5}', '{"sky": [5]}'])
def test_a_garbled_list_of_words_is_told_in_one_line(tmp_path, text):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(SystemExit, match="words.json: looked for {class: .words.}"):
        text2mask.read_words(tmp_path / "words.json")


def test_bad_input_of_a_synthesis_leaves_no_folder(shapes, tmp_path, monkeypatch):
    import imgsyn
    data = shutil.copytree(shapes, tmp_path / "data")
    flags = ("--data", data, "--limit", 2, "--device", "cpu", "--mask2img", Path(REPO, "weights/shapes/mask2img"))
    for more, words in ((("--steps", 1001), "take fewer"), (("--steps", 10 ** 20), "take fewer")):
        with pytest.raises(SystemExit, match=words):
            run(monkeypatch, imgsyn, *flags, *more, "--out", tmp_path / "out")
    mask = data / "train" / "masks" / f"{text2mask.names_of(data / 'train')[0][1]}.png"
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(SystemExit, match="not colours"):
        run(monkeypatch, imgsyn, *flags, "--steps", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_captions_name_classes_by_words_and_phrases():
    forms = {"car": ["car", "cars"], "dining table": ["dining table"], "sky": ["under the sky"], "ship": ["ship"]}
    assert text2mask.named("Two cars, a dining  table; no ships without sky.", forms) == {"car", "dining table"}
    assert text2mask.named("under the sky: a ship", forms) == {"sky", "ship"}


@pytest.mark.parametrize("per, batch, world", [(1, 4, 1), (3, 4, 2), (2, 16, 3)])
def test_work_covers_all_pairs_once_and_more_of_each_leaves_the_rest(per, batch, world):
    import masksyn
    sources = [f"s{i}" for i in range(10)]
    ranks = [masksyn.work(sources, per, batch, rank, world) for rank in range(world)]
    jobs = [job for part in ranks for jobs in part for job in jobs]
    assert sorted(jobs) == sorted((s, k) for s in sources for k in range(per))
    more, longer = masksyn.work(sources, per + 1, batch, 0, 1), masksyn.work(sources * 2, 1, batch, 0, 1)
    assert more[:-(-10 // batch) * per] == masksyn.work(sources, per, batch, 0, 1)
    assert longer[:10 // batch] == masksyn.work(sources, 1, batch, 0, 1)[:10 // batch]


# ---- the process ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["cosine", "scaled_linear"])
def test_targets_and_to_x0_agree(kind, prediction):
    schedule = diffusion.Schedule(kind, prediction)
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in (10, 500, 900):
        steps = torch.full((2,), t)
        x, out = schedule.noised(x0, noise, steps), schedule.target(x0, noise, steps)
        assert torch.allclose(schedule.to_x0(out, x, schedule.sigmas[t].item()), x0, atol=2e-3)


def test_a_schedule_stays_on_the_cpu():
    with torch.device("meta"):                                           # as `load` does with a GPU
        schedule = diffusion.Schedule()
    assert all(schedule.t_of(sigma) == i for i, sigma in enumerate(schedule.sigmas.tolist()))


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++", "edm"])
def test_samplers_reach_a_gaussian_exactly(sampler):
    """Data of N(m, s^2) has the closed-form denoiser (s^2 x + sigma^2 m) / (s^2 + sigma^2)."""
    m, s = 0.3, 0.5
    torch.manual_seed(0)
    out = diffusion.sample(lambda x, sigma: (s ** 2 * x + sigma ** 2 * m) / (s ** 2 + sigma ** 2),
                           diffusion.Schedule("cosine", "sample", "trailing"), torch.randn(20000, 1), 100, sampler)
    assert abs(out.mean() - m) < 0.02 and abs(out.std() - s) < 0.02


@pytest.mark.parametrize("steps", [25, 200])
def test_edm_stays_within_the_noise_the_network_knows(steps):
    schedule, asked = diffusion.Schedule(), []
    diffusion.sample(lambda x, sigma: asked.append(sigma) or x / (1 + sigma ** 2), schedule, torch.randn(1, 2), steps, "edm")
    assert max(asked) <= schedule.sigmas[-1].item() * (1 + 1e-6) and len(asked) == 2 * steps - 1


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_peer_schedulers_walk_the_same_way(sampler, steps, spacing, tmp_path):
    """On SDXL's scheduler_config.json and a spacing, with any network: the same steps, inputs and end."""
    peers = pytest.importorskip("diffusers")
    config = SDXL_NOISE | dict(timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    peer = dict(euler=peers.EulerDiscreteScheduler, ddim=peers.DDIMScheduler)
    peer = peer.get(sampler, peers.DPMSolverMultistepScheduler).from_config(config)
    peer.set_timesteps(steps)
    schedule = diffusion.Schedule.from_public(tmp_path / "config.json")
    torch.manual_seed(0)
    noise, mix = torch.randn(2, 4, 8, 8), torch.randn(4, 4) / 3
    seen = []

    def net(x, t):
        seen.append(x)
        return torch.einsum("bchw,dc->bdhw", x, mix) * math.cos(float(t) / 300)
    x = noise * peer.init_noise_sigma
    for t in peer.timesteps:
        x = peer.step(net(peer.scale_model_input(x, t), t), t, x).prev_sample
    ours = diffusion.sample(diffusion.denoiser(lambda x, t: net(x, t[0]), schedule, ()), schedule, noise, steps, sampler)
    assert schedule.grid(steps, sampler)[1] == [float(t) for t in peer.timesteps]
    assert (ours - x).abs().max() / x.abs().max() < 1e-5
    assert len(seen) == 2 * steps
    assert all(error(a, b) < 1e-5 for a, b in zip(seen[steps:], seen[:steps]))


def test_guidance_in_one_batch_equals_two_calls():
    schedule, net = diffusion.Schedule("cosine", "sample"), diffusion.Points(16)
    x, arm, null = torch.randn(5, 2), torch.zeros(5, 1, dtype=torch.long), torch.full((5, 1), 2)
    both = diffusion.denoiser(net, schedule, (arm,), (null,), 3.0)(x, 1.5)
    yes, no = (diffusion.denoiser(net, schedule, (c,))(x, 1.5) for c in (arm, null))
    assert torch.allclose(both, no + 3 * (yes - no), atol=1e-5)
    high = diffusion.denoiser(net, schedule, (arm,), (null,), 3.0, above=1.0)             # unguided from sigma 1 down
    assert torch.equal(high(x, 1.5), both)
    assert torch.equal(high(x, 1.0), diffusion.denoiser(net, schedule, (arm,))(x, 1.0))


def toy(out, steps, spoil=None, **more):
    torch.manual_seed(0)
    model, schedule = diffusion.Points(16), diffusion.Schedule("cosine", "v_prediction")
    count = [0]

    def loss(net, batch):
        count[0] += 1
        if spoil and count[0] == spoil:
            return diffusion.loss(net, schedule, batch["x"] * float("nan"), batch["arm"])
        if more.get("stop") == count[0]:
            raise KeyboardInterrupt
        error = diffusion.loss(net, schedule, batch["x"], batch["arm"])
        return error + (net.arm.weight * 0).sqrt().sum() if more.get("bend") == count[0] else error    # 0, gradient NaN
    return diffusion.fit(model, loss, diffusion.Spiral(), out, steps=steps, batch=8, lr=1e-3, device="cpu", save_every=4,
                         report_every=2, accumulate=more.get("accumulate", 1), about=more.get("about"))


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    toy(tmp_path / "a", 12)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "b", 12, stop=7)
    toy(tmp_path / "b", 12)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    steps = [[json.loads(line)["step"] for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "ab"]
    assert steps[0] == steps[1] == [2, 4, 6, 8, 10, 12]


def test_the_average_is_lent_and_given_back():
    net = diffusion.Points(8)
    first = [p.detach().clone() for p in net.parameters()]
    average = diffusion.EMA(net)
    for p in net.parameters():
        p.data += 1
    for _ in range(2):
        with average.applied():
            assert all(torch.equal(p, a) for p, a in zip(net.parameters(), first))
        assert all(torch.equal(p, a + 1) for p, a in zip(net.parameters(), first))
        assert all(torch.equal(p, a) for p, a in zip(average.shadow.values(), first))


def test_nan_loss_stops_and_keeps_the_last_state(tmp_path):
    with pytest.raises(SystemExit, match="step 7"):
        toy(tmp_path, 12, spoil=7)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["model"].values())


@pytest.mark.parametrize("step, words", [(4, "step 4; nothing was saved yet"), (8, "step 8; the last good state")])
def test_nan_gradient_of_a_finite_loss_is_never_saved(tmp_path, step, words):
    with pytest.raises(SystemExit, match=words):
        toy(tmp_path, 12, bend=step)                                     # on the very step that saves
    saved = [diffusion.read(tmp_path, "Points")[1]] if step == 8 else []
    assert all(p.isfinite().all() for state in saved for p in state.values())
    assert (tmp_path / "state.pt").exists() == (tmp_path / "model.safetensors").exists() == (step == 8)


def test_other_settings_do_not_resume(tmp_path):
    toy(tmp_path, 4)
    with pytest.raises(SystemExit, match="steps 4 then, 8 now"):
        toy(tmp_path, 8)
    toy(tmp_path, 4, about=dict(drop="0.1"))                             # a state that does not say goes on
    toy(tmp_path / "b", 4, about=dict(drop="0.1"))
    with pytest.raises(SystemExit, match="drop 0.1 then, 0.2 now"):
        toy(tmp_path / "b", 4, about=dict(drop="0.2"))


def test_a_base_or_data_of_the_same_name_but_changed_does_not_resume(shapes, tmp_path, monkeypatch):
    import mask2img
    data = shutil.copytree(shapes, tmp_path / "data")
    flags = ("--data", data, "--size", 32, "--steps", 1, "--batch", 2, "--device", "cpu")
    run(monkeypatch, mask2img, "base", "--split", "train", "--out", tmp_path / "base", *flags)
    train = ("train", "--init", tmp_path / "base", "--out", tmp_path / "m", *flags)
    run(monkeypatch, mask2img, *train)
    run(monkeypatch, mask2img, *train)                                   # done: nothing to do, nothing to refuse
    diffusion.halve(tmp_path / "base", tmp_path / "base")
    with pytest.raises(SystemExit, match="a run with other settings is there .init .*base .{12} then, .*base .{12} now"):
        run(monkeypatch, mask2img, *train)
    name = text2mask.names_of(data / "train")[-1][1]
    for part in ("images", "masks"):
        (data / "train" / part / f"{name}.png").unlink()
    with pytest.raises(SystemExit, match="pairs 12 pairs .{12} then, 11 pairs .{12} now"):
        run(monkeypatch, mask2img, *train)


def test_weights_are_readable_as_other_files_are(tmp_path):
    diffusion.save(diffusion.Points(16), tmp_path)
    m2f.save(m2f.Mask2Former(3, **TOY), tmp_path / "segmenter.safetensors")
    (tmp_path / "file").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("model.safetensors", "segmenter.safetensors", "file")}
    assert len(modes) == 1


@pytest.mark.parametrize("spoil", [lambda state: state["model"].popitem(), lambda state: state.pop("step"),
                                   lambda state: state["optimiser"].pop("param_groups")])
def test_a_state_of_another_layout_is_told_in_one_line(tmp_path, spoil):
    toy(tmp_path, 4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="state of this version and its log, found KeyError"):
        toy(tmp_path, 4)


@pytest.mark.parametrize("about, words", [
    ("{", "JSONDecodeError"), ("[1]", "AttributeError"), ('{"format": "seggen-1", "class": "Points", "config": {"width": "x"}}',
                                                       "constructor arguments")])
def test_garbled_metadata_is_told_in_one_line(tmp_path, about, words):
    diffusion.write_tensors({"a": torch.zeros(1)}, dict(seggen=about), tmp_path)
    with pytest.raises(SystemExit, match=words):
        diffusion.load(diffusion.Points, tmp_path)


def test_weights_that_are_not_finite_are_told_in_one_line(tmp_path):
    model = diffusion.Points(16)
    next(model.parameters()).data.fill_(math.nan)
    diffusion.save(model, tmp_path)
    with pytest.raises(SystemExit, match="not finite"):
        diffusion.load(diffusion.Points, tmp_path)


def test_a_full_disk_is_told_in_one_line(tmp_path):
    """RLIMIT_FSIZE stands in for it (Python ignores SIGXFSZ): no file may grow over so many bytes."""
    (tmp_path / "fill.py").write_text(
        "import resource, test_all\n"
        "for room in (0, 4000, 12000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        test_all.toy(f'room{room}', 4)\n"
        "    except SystemExit as told:\n"
        "        print(told)\n")
    told = script(tmp_path / "fill.py", cwd=tmp_path).stdout.splitlines()
    told = [line for line in told if "loss" not in line]                 # what was reported before it was full
    assert [line.split(": cannot write here")[0] for line in told] == [
        "room0/log.jsonl", "room4000/model.safetensors", "room12000/state.pt"], told
    assert not list(tmp_path.glob("*/.*.tmp*")) and not list(tmp_path.glob("*/state.pt"))


def test_devices_numbers_and_steps_that_are_none_are_told_in_one_line(monkeypatch, capsys):
    import mask2img
    import masksyn
    for device in ("foo", "cuda:", "cpu:1"):
        with pytest.raises(SystemExit, match=f"--device {device}: looked for cpu, cuda or cuda:N"):
            diffusion.start(device)
    for module, flags in ((text2mask, "sample --prompt x --guidance nan"), (text2mask, "train --drop 2"),
                          (text2mask, "train --drop nan"), (text2mask, "train --noise-offset inf"),
                          (mask2img, "train --workers -1"), (mask2img, "sample --mask x --guidance -1"),
                          (masksyn, "--guidance inf"), (masksyn, "--mask-guidance -1")):
        with pytest.raises(SystemExit):
            run(monkeypatch, module, *flags.split())
        assert "is needed" in capsys.readouterr().err, flags
    for spacing, sampler, steps in (("trailing", "dpm++", 1001), ("leading", "dpm++", 1000), ("linspace", "euler", 1200)):
        with pytest.raises(SystemExit, match=f"--steps {steps}: .* take fewer"):
            diffusion.Schedule(spacing=spacing).grid(steps, sampler)
    assert len(diffusion.Schedule(spacing="trailing").grid(1000, "dpm++")[1]) == 1000


class Boom:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_checkpoints_that_are_none_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = diffusion.Points(8)
    diffusion.save(model, tmp_path / "good")
    again = diffusion.load(diffusion.Points, tmp_path / "good")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-20])
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Boom()))
    (tmp_path / "newer.safetensors").write_bytes(whole.replace(b"seggen-1", b"seggen-9"))
    for name, words in (("cut.safetensors", "truncated"), ("pickle.safetensors", "never a pickle"),
                        ("newer.safetensors", "seggen-9"), ("missing", "no such file")):
        with pytest.raises(SystemExit, match=words):
            diffusion.read(tmp_path / name, "Points")
    with pytest.raises(SystemExit, match="Text2Mask"):
        diffusion.read(tmp_path / "good", "Text2Mask")
    assert not (tmp_path / "exploded").exists()
    model.config["depth"] = 2
    diffusion.save(model, tmp_path / "other")
    with pytest.raises(SystemExit, match="constructor arguments, found others .*depth"):
        diffusion.load(diffusion.Points, tmp_path / "other")
    with pytest.raises(SystemExit, match="typo.*looked for a checkpoint to halve"):
        diffusion.halve("typo", tmp_path / "half")


# ---- the chain --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small drawn world: 12 training pairs."""
    out = tmp_path_factory.mktemp("world")
    full = text2mask.dataset_folder("shapes", "train")
    for split in ("train", "val"):
        for path, name in text2mask.names_of(full.parent / split)[:12]:
            for part, end in (("images", path.suffix), ("masks", ".png"), ("instances", ".png"), ("captions", ".txt")):
                (out / split / part).mkdir(parents=True, exist_ok=True)
                shutil.copy(full.parent / split / part / f"{name}{end}", out / split / part)
        shutil.copy(full / "classes.json", out / split)
    return out


def test_generators_train_and_feed_masksyn(shapes, tmp_path):
    """base -> text2mask -> mask2img -> masksyn, two steps each, at another size."""
    flags = ("--data", shapes, "--size", "48x32", "--steps", 2, "--batch", 2, "--device", "cpu")
    script("mask2img.py", "base", "--split", "train", "--out", tmp_path / "base", *flags)
    script("text2mask.py", "train", "--init", tmp_path / "base", "--out", tmp_path / "t", *flags)
    script("mask2img.py", "train", "--init", tmp_path / "base", "--out", tmp_path / "m", *flags)
    base, ours = (diffusion.read(tmp_path / d, k)[1] for d, k in (("base", "TextToImage"), ("m", "Mask2Img")))
    assert all(torch.equal(base[name], ours[name]) for name in base)                     # the base stayed frozen
    assert "condition_gap" in (tmp_path / "m" / "log.jsonl").read_text()
    script("masksyn.py", "--data", shapes, "--text2mask", tmp_path / "t", "--mask2img", tmp_path / "m", "--limit", 3,
           "--steps", 2, "--mask-steps", 2, "--out", tmp_path / "pairs")
    assert len(list((tmp_path / "pairs" / "images").glob("*.png"))) == 3
    assert Image.open(next((tmp_path / "pairs" / "images").glob("*.png"))).size == (48, 32)
    wrong = script("masksyn.py", "--data", shapes, "--text2mask", tmp_path / "m", "--limit", 1, ok=False)
    assert "Text2Mask" in wrong.stderr


def untrained(world, out, size=(16, 16), **more):
    """Both generators with random weights for the classes of a world -> masksyn's flags for them."""
    import mask2img
    tiny, classes = nets.PRESETS["tiny"], text2mask.read_classes(world / "train")
    torch.manual_seed(0)
    shared = dict(text=tiny["text"], schedule=mask2img.SCHEDULE, size=size, classes=classes)
    painter = text2mask.Text2Mask(dict(tiny["unet"], out_channels=len(classes) + 2), **shared)
    control = dict(tiny["controlnet"], conditioning_channels=len(classes) + 2)
    printer = mask2img.Mask2Img(tiny["unet"], controlnet=control, **shared | more)
    diffusion.save(painter, out / "t")
    diffusion.save(printer, out / "m")
    return ["--text2mask", out / "t", "--mask2img", out / "m", "--limit", 2, "--steps", 2, "--mask-steps", 2,
            "--device", "cpu"]


def test_the_weighted_loss_is_least_at_the_true_shares():
    """Rare codes weigh more while learning, and yet the logits that a network ends with are the log of the shares."""
    counts, K = torch.tensor([0, 200, 40, 16, 0]), 3
    codes = torch.repeat_interleave(torch.arange(K + 2), counts).view(1, 16, 16)
    weights = text2mask.rarities({(0, 0): dict(codes=codes)}, K + 2)
    assert torch.allclose((weights * counts).sum(), torch.tensor(256.0)) and weights[0] == weights[4] == 1
    assert weights[3] / weights[1] == pytest.approx(200 / 16)
    tiny, classes = nets.PRESETS["tiny"], [dict(name=n, isthing=False) for n in "abc"]
    model = text2mask.Text2Mask(dict(tiny["unet"], out_channels=K + 2), tiny["text"],
                                dict(kind="cosine", prediction="sample"), (16, 16), classes)
    batch = dict(codes=codes, tokens=torch.zeros(1, 4, dtype=torch.long), time_ids=torch.zeros(1, 6))
    for rarity in (weights, torch.ones(K + 2)):
        model.rarity = rarity
        for share, least in ((counts / 256, True), (torch.tensor([0, 0.5, 0.3, 0.2, 0]), False)):
            z = (share + 1e-9).log().requires_grad_()
            loss = model.loss(lambda x, *_: z.view(1, -1, 1, 1).expand(1, -1, *x.shape[2:]), batch, 0.0)
            gradient, = torch.autograd.grad(loss, z)
            assert (gradient.abs().max() < 1e-6) == least


def test_synthetic_folders_are_pair_folders_of_their_own(shapes, tmp_path, monkeypatch):
    """A world without things gives no instances/, classes.json is the source's, captions are composed where there are
    none; a folder of real data, or of pairs by other weights, is left alone."""
    import imgsyn
    import masksyn
    world = tmp_path / "world"
    shutil.copytree(shapes, world)
    for split in ("train", "val"):
        listing = [c | {"isthing": False} for c in json.loads((world / split / "classes.json").read_text())]
        (world / split / "classes.json").write_text(json.dumps(listing))
        shutil.rmtree(world / split / "instances")
        shutil.rmtree(world / split / "captions")
    flags = untrained(world, tmp_path)
    for module, more in ((masksyn, flags), (imgsyn, flags[2:6] + flags[6:8] + flags[10:])):
        out = tmp_path / module.__name__
        (out / "mine").mkdir(parents=True)
        (out / "mine" / ".notes.tmp").mkdir()
        (out / "mine" / ".notes.tmp" / ".x.tmp").write_text("kept")
        (out / ".meta.tmp7.json").write_text("of a killed run")
        run(monkeypatch, module, "--data", world, *more, "--out", out)
        assert not (out / "instances").exists() and not list(out.glob(".*.tmp*"))
        assert (out / "mine" / ".notes.tmp" / ".x.tmp").exists()
        assert (out / "classes.json").read_bytes() == (world / "train" / "classes.json").read_bytes()
        assert len(T.Pairs(out)) == 2
        assert all(p.read_text().startswith("a picture of ") for p in (out / "captions").iterdir())
    (world / "train/captions").mkdir()
    (world / "train/captions/00000.txt").write_text("a line that was not there\n")
    with pytest.raises(SystemExit, match="other settings"):                          # the data changed
        run(monkeypatch, masksyn, "--data", world, *flags, "--out", tmp_path / "masksyn")
    shutil.rmtree(world / "train/captions")
    run(monkeypatch, masksyn, "--data", world, *flags, "--out", tmp_path / "masksyn")
    (world / ".train.unfinished").write_text("")
    with pytest.raises(SystemExit, match="found a half-made one"):
        run(monkeypatch, masksyn, "--data", world, *flags, "--out", tmp_path / "half")
    with pytest.raises(T.BadInput, match="found a half-made one"):
        T.Pairs(world / "train")
    (world / ".train.unfinished").unlink()
    before = bytes_of(world)
    with pytest.raises(SystemExit, match="without a meta.json"):
        run(monkeypatch, masksyn, "--data", world, *flags, "--out", world / "train")
    assert bytes_of(world) == before
    run(monkeypatch, masksyn, "--data", world, *flags, "--out", tmp_path / "masksyn")    # the same again: nothing to do
    model = diffusion.load(text2mask.Text2Mask, tmp_path / "t")
    model.unet.conv_out.bias.data += 1
    diffusion.save(model, tmp_path / "t")                                # trained on: another Text2Mask
    with pytest.raises(SystemExit, match="other settings"):
        run(monkeypatch, masksyn, "--data", world, *flags, "--out", tmp_path / "masksyn")


def test_generators_that_do_not_fit_are_told_in_one_line(shapes, tmp_path, monkeypatch):
    import mask2img
    import masksyn
    flags = untrained(shapes, tmp_path / "a") and untrained(shapes, tmp_path / "b", (16, 32))
    flags[1] = tmp_path / "a" / "t"
    with pytest.raises(SystemExit, match=r"looked for the \(H, W\) \[16, 16\]"):
        run(monkeypatch, masksyn, "--data", shapes, *flags, "--out", tmp_path / "out")
    world = tmp_path / "world"
    shutil.copytree(shapes, world)
    listing = json.loads((world / "val" / "classes.json").read_text())
    (world / "val" / "classes.json").write_text(json.dumps(listing[::-1]))
    with pytest.raises(SystemExit, match="val/classes.json: its 13 classes are not the 13 expected"):
        run(monkeypatch, text2mask, "measure", "--data", world, "--init", tmp_path / "a" / "t")
    with pytest.raises(SystemExit, match="val/classes.json: its 13 classes are not the 13 expected"):
        run(monkeypatch, mask2img, "train", "--data", world, "--size", 16, "--out", tmp_path / "out", "--device", "cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how, words", [("extra", "unet.more is in one only"), ("missing", "unet.conv_in.bias is in one"),
                                        ("shape", "unet.conv_in.bias has another"), ("argument", "constructor arguments")])
def test_a_base_of_another_layout_is_told_in_one_line(tmp_path, how, words):
    import mask2img
    tiny, classes = nets.PRESETS["tiny"], [dict(name="a", isthing=False)] * 4
    base = text2mask.TextToImage(tiny["unet"], tiny["text"], mask2img.SCHEDULE, (16, 16))
    state = base.state_dict()
    if how == "extra":
        state["unet.more"] = torch.zeros(1)
    elif how == "argument":
        base.config["unet"] = dict(base.config["unet"], colour="red")
    elif how == "missing":
        del state["unet.conv_in.bias"]
    else:
        state["unet.conv_in.bias"] = state["unet.conv_in.bias"][1:].clone()
    about = dict(format=diffusion.FORMAT, config=base.config) | {"class": "TextToImage"}
    diffusion.write_tensors(state, dict(seggen=json.dumps(about)), tmp_path)
    for module in (text2mask, mask2img):
        args = SimpleNamespace(public=False, init=tmp_path, size=(16, 16), edges=False, unfreeze=False)
        with pytest.raises(SystemExit, match=words):
            module.assembled(args, classes)


def test_missing_shapes_are_drawn_and_half_drawn_ones_again(tmp_path, monkeypatch):
    monkeypatch.setattr(text2mask, "ROOT", tmp_path)
    shapes, other = tmp_path / "data/shapes", tmp_path / "data/other"
    (other / "train/images").mkdir(parents=True)
    shapes.mkdir()
    (shapes / "prepare.py").write_text(
        "import pathlib, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "with open(here / 'log', 'a') as log: log.write(' '.join(sys.argv[1:]) + ';')\n"
        "if (here / 'broken').exists(): sys.exit('no room')\n"
        "for split in ('train', 'val', 'unlabelled'):\n"
        "    (here / split).mkdir(exist_ok=True)\n"
        "    (here / f'.{split}.unfinished').unlink(missing_ok=True)\n")
    for split, mark, drawn in (("train", None, ";"), ("train", None, ";"), ("val", None, ";"), ("val", "val", ";;"),
                               ("val", "train", ";;"), ("train", None, ";;;"), ("unlabelled", "unlabelled",
                                                                              ";;;--unlabelled 8000;")):
        if mark:
            (shapes / f".{mark}.unfinished").touch()
        assert text2mask.dataset_folder("shapes", split) == shapes / split
        assert (shapes / "log").read_text() == drawn
    (shapes / ".train.unfinished").touch()
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")                                        # another rank draws
        text2mask.dataset_folder("shapes", "train")
    (shapes / "broken").touch()
    with pytest.raises(SystemExit, match="prepare.py failed"):
        text2mask.dataset_folder("shapes", "train")
    assert (shapes / "log").read_text() == ";;;--unlabelled 8000;;"
    with pytest.raises(SystemExit, match="other/test: looked for a pair folder, found none; there are train$"):
        text2mask.dataset_folder("other", "test")


def test_default_weights_are_the_given_the_shipped_then_the_trained(tmp_path, monkeypatch):
    import masksyn
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(masksyn, "ROOT", tmp_path / "repository")
    demo, choose = tmp_path / "repository/weights/shapes/text2mask", masksyn.demo_or_trained
    assert choose("shapes", "text2mask", None) == Path("out/shapes/text2mask")
    demo.mkdir(parents=True)
    (demo / "model.safetensors").touch()
    assert choose("shapes", "text2mask", None) == demo and choose("shapes", "text2mask", Path("x")) == Path("x")
    assert choose("data/mine/", "text2mask", None) == Path("out/mine/text2mask")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert text2mask.name_of(".") == "mine" and text2mask.name_of("..") == tmp_path.name


FAST = ("--device", "cpu", "--limit", "6", "--batch", "2", "--steps", "3", "--mask-steps", "3")


def test_masksyn_survives_sigkill_and_ends_with_the_same_bytes(shapes, tmp_path):
    script("masksyn.py", "--data", shapes, *demo(), *FAST, "--out", tmp_path / "whole")
    run = subprocess.Popen([sys.executable, "masksyn.py", "--data", str(shapes), *map(str, demo()), *FAST, "--out",
                            str(tmp_path / "killed")], cwd=REPO, stderr=subprocess.DEVNULL)
    limit = time.time() + 60
    while time.time() < limit and len(list((tmp_path / "killed").glob("images/[!.]*.png"))) < 3:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 3 <= len(list((tmp_path / "killed").glob("images/[!.]*.png"))) < 6            # it was caught in the middle
    script("masksyn.py", "--data", shapes, *demo(), *FAST, "--out", tmp_path / "killed")
    whole, killed = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "killed")
    killed = {name: data for name, data in killed.items() if not name.name.startswith(".")}
    assert whole == killed
    names = {p.stem for p in (tmp_path / "whole" / "images").iterdir()}
    assert names == {p.stem for p in (tmp_path / "whole" / "masks").iterdir()} and len(names) == 6
    other = script("masksyn.py", "--data", shapes, *demo(), *FAST, "--seed", 1, "--out", tmp_path / "whole", ok=False)
    assert "other settings" in other.stderr


def test_generator_training_survives_sigkill_and_ends_with_the_same_bytes(shapes, tmp_path):
    flags = ["text2mask.py", "train", "--data", shapes, "--size", "16", "--steps", "24", "--save-every", "8", "--batch", "2",
             "--device", "cpu"]
    script(*flags, "--out", tmp_path / "whole", OMP_NUM_THREADS="1")
    run = subprocess.Popen([sys.executable, *map(str, flags), "--out", str(tmp_path / "killed")], cwd=REPO,
                           env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.time() + 60
    while time.time() < limit and not (tmp_path / "killed/state.pt").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    state = torch.load(tmp_path / "killed/state.pt", weights_only=True)
    assert 8 <= state["step"] < 24                                       # it was caught in the middle
    script(*flags, "--out", tmp_path / "killed", OMP_NUM_THREADS="1")
    for name in ("model.safetensors", "samples.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    steps = [[json.loads(line)["step"] for line in open(tmp_path / run / "log.jsonl")] for run in ("whole", "killed")]
    assert steps[0] == steps[1]


def demo():
    return "--text2mask", REPO / "weights/shapes/text2mask", "--mask2img", REPO / "weights/shapes/mask2img"


@pytest.mark.parametrize("mode, skip, port", [("masksyn.py", 0, 29516), ("imgsyn.py", 2, 29517)])
def test_two_ranks_write_what_one_writes(shapes, tmp_path, mode, skip, port):
    """With one thread on either side: how sums are split over threads changes their last bits."""
    flags = [mode, "--data", shapes, *demo()[skip:], *FAST[:len(FAST) - skip]]
    script(*flags, "--out", tmp_path / "one", OMP_NUM_THREADS="1")
    script("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, *flags, "--out", tmp_path / "two",
           OMP_NUM_THREADS="1")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_prompt_and_mask_commands(tmp_path):
    script("text2mask.py", "sample", "--prompt", "a red house by the water — naïve café 日本 " * 9, "--steps", 3, "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mask.png", "colours.png", "legend.png"}
    script("mask2img.py", "sample", "--mask", tmp_path / "mask.png", "--prompt", "a house", "--steps", 2, "--count", 2,
           "--out", tmp_path / "deep" / "er")
    assert Image.open(tmp_path / "deep" / "er" / "images.png").width == 3 * 256


def spoiled(world, out, how):
    shutil.copytree(world, out)
    train = out / "train"
    image, mask = (sorted((train / part).iterdir())[0] for part in ("images", "masks"))
    if how == "mask gone":
        mask.unlink()
    elif how == "image gone":
        image.unlink()
    elif how == "cut":
        image.write_bytes(image.read_bytes()[:200])
    elif how == "rgb mask":
        Image.open(mask).convert("RGB").save(mask)
    elif how == "other size":
        Image.open(mask).resize((32, 32), 0).save(mask)
    elif how == "id 99":
        Image.fromarray(np.full((64, 64), 99, np.uint8)).save(mask)
    elif how == "215 classes":
        (train / "classes.json").write_text(json.dumps([dict(name=str(i), isthing=False) for i in range(215)]))
    elif how == "empty":
        shutil.rmtree(train / "images")
    return out


@pytest.mark.parametrize("how, words", [("mask gone", "without a mask"), ("image gone", "without an image"), ("cut", "readable"),
                                        ("rgb mask", "mode RGB"), ("other size", "must agree"), ("id 99", "class id 99"),
                                        ("215 classes", "215 classes"), ("empty", "found none")])
def test_bad_pairs_are_told_in_one_line(shapes, tmp_path, how, words):
    folder = spoiled(shapes, tmp_path / "world", how) / "train"
    with pytest.raises(SystemExit, match=words) as error:
        data = text2mask.Pairs(folder, (64, 64), lambda captions: torch.zeros(len(captions), 8, dtype=torch.long))
        [data[i, 0] for i in range(len(data))]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how, words", [("size", "must agree"), ("RGB", "instance ids"), ("id 256", "instance id 256")])
def test_bad_instance_maps_are_told_in_one_line(shapes, tmp_path, how, words):
    import imgsyn
    folder = shutil.copytree(shapes / "train", tmp_path / "train")
    path = sorted((folder / "instances").iterdir())[0]
    image = {"size": Image.new("L", (64, 60)), "RGB": Image.new("RGB", (64, 64)), "id 256": Image.new("I;16", (64, 64), 256)}
    image[how].save(path)
    data = text2mask.Pairs(folder, (64, 64), lambda c: torch.zeros(len(c), 8, dtype=torch.long), edges=True)
    for read in (lambda: data[0, 0], lambda: imgsyn.read_mask(folder, path.stem, 13, (64, 64))):
        with pytest.raises(SystemExit, match=words):
            read()


def test_a_picture_that_would_fill_the_memory_is_told_in_one_line(shapes, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SystemExit, match="DecompressionBombError"):
        text2mask.open_image(next((shapes / "train/images").iterdir()))


def test_a_loading_process_ends_in_its_own_line(shapes, tmp_path):
    world = spoiled(shapes, tmp_path / "world", "cut")
    told = script("mask2img.py", "train", "--data", world, "--size", 16, "--steps", 40, "--batch", 8, "--workers", 1,
                  "--device", "cpu", "--out", tmp_path / "out", ok=False).stderr
    assert "looked for a readable image" in told and "see the line above" in told


def test_captions_with_sides_are_never_mirrored(shapes, tmp_path):
    folder = shutil.copytree(shapes / "train", tmp_path / "train")
    name, tokens = text2mask.names_of(folder)[0][1], lambda c: torch.zeros(len(c), 8, dtype=torch.long)
    for caption, views in (("a house on the left.", 1), ("Right: a tree", 1), ("a bright house", 2)):
        (folder / "captions" / f"{name}.txt").write_text(caption)
        data = text2mask.Pairs(folder, (64, 64), tokens, images=False)
        assert len({data[0, seed]["codes"].numpy().tobytes() for seed in range(12)}) == views, caption


def test_odd_pairs_are_accepted(shapes, tmp_path):
    """Grey, RGBA and palette images, an all-void mask, an empty caption file, no caption file."""
    shutil.copytree(shapes / "train", tmp_path / "train")
    images, masks, captions = (sorted((tmp_path / "train" / part).iterdir()) for part in ("images", "masks", "captions"))
    for path, mode in zip(images, ("L", "RGBA", "P")):
        Image.open(path).convert(mode).save(path)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(masks[0])
    captions[1].write_text("")
    captions[2].unlink()
    data = text2mask.Pairs(tmp_path / "train", (64, 64), lambda c: torch.zeros(len(c), 8, dtype=torch.long))
    assert all(data[i, 0]["image"].shape == (3, 64, 64) for i in range(len(data)))


@pytest.mark.parametrize("command, words", [
    (("masksyn.py", "--data", "nowhere"), "found none"), (("masksyn.py", "--limit", "0"), "over zero"),
    (("masksyn.py", "--limit", "-3"), "over zero"), (("imgsyn.py", "--out", "/proc/pairs"), "cannot write"),
    (("text2mask.py", "train", "--lr", "nan"), "over zero"), (("text2mask.py", "train", "--size", "65"), "multiples of 8"),
    (("mask2img.py", "sample", "--mask", "nothing.png"), "nothing.png")])
def test_bad_commands_are_told_in_one_line(command, words):
    assert words in script(*command, ok=False).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda():
    assert "found none" in script("masksyn.py", "--device", "cuda", ok=False).stderr


def test_the_crop_of_a_mirror_image_is_counted_in_it(tmp_path):
    """Column x of a picture 64 wide has the value x: what is seen says where it was cut."""
    folder(tmp_path, n=1)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "images/000.png")
    Image.fromarray(ramp[:, :, 0] % 4).save(tmp_path / "masks/000.png")
    tokenize = nets.TextEncoder().tokenize
    data, mirrored = text2mask.Pairs(tmp_path, (32, 32), tokenize), set()
    for seed in range(40):
        item = data[0, seed]
        seen = ((item["image"][0, 0] + 1) * 127.5).round().int()         # (32,)
        mirrored.add(mirror := bool(seen[0] > seen[-1]))
        assert seen[0] == (63 - item["time_ids"][3] if mirror else item["time_ids"][3])
        assert torch.equal(item["codes"][0], seen.long() % 4)
    assert mirrored == {True, False}


@pytest.mark.parametrize("size, scale", [(32, 2), (264, 1)])
def test_a_contact_sheet_of_large_pictures_is_not_enlarged(tmp_path, size, scale):
    import masksyn
    folder(tmp_path, n=1, size=size)
    masksyn.contact_sheet(tmp_path, text2mask.read_classes(tmp_path))
    assert Image.open(tmp_path / "samples.png").width == 8 * size * scale


# ---- what the files promise -------------------------------------------------------------------------------------

def siblings(name):
    tree = ast.parse((REPO / f"{name}.py").read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return found & set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_needs_line_is_true_and_the_file_copies_alone(name, tmp_path):
    needs, todo = set(), [name]
    while todo:
        needs |= (new := siblings(todo.pop()) - needs)
        todo += new
    line = re.search(r"^Needs:(.*)$", ast.get_docstring(ast.parse((REPO / f"{name}.py").read_text())), re.M).group(1)
    assert set(re.findall(r"(\w+)\.py", line)) == needs
    for each in {name} | needs:
        shutil.copy(REPO / f"{each}.py", tmp_path)
    script("-c", f"import {name}", cwd=tmp_path, PYTHONPATH=str(tmp_path))


# ======================================== data/shapes

SHAPES = os.path.join(REPO, "data", "shapes", "prepare.py")


def shapes_shapes():
    spec = importlib.util.spec_from_file_location("shapes_prepare", SHAPES)
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes_prepare"] = module                          # so that worker processes find it
    spec.loader.exec_module(module)
    return module


def files(folder):
    """{relative path: bytes} of everything below a folder."""
    found = (os.path.join(d, f) for d, _, names in os.walk(folder) for f in names)
    return {os.path.relpath(p, folder): open(p, "rb").read() for p in found}


def small(monkeypatch):
    module = shapes_shapes()
    monkeypatch.setattr(module, "SPLITS", {"train": 10, "val": 4, "unseen": 6})
    return module


def test_shapes_same_bytes_for_any_number_of_processes_and_after_an_interruption(tmp_path, monkeypatch):
    module = small(monkeypatch)
    a, b = tmp_path / "a", tmp_path / "b"
    assert module.prepare(str(a), 32, processes=1, unlabelled=3) == 23
    module.prepare(str(b), 32, processes=2, unlabelled=3)
    assert files(a) == files(b) and len(files(a)) == 4 * 20 + 2 * 3 + 2 * 3
    for name in ("train/images/00003.png", "val/images/00001.png", "val/masks/00001.png"):
        os.remove(b / name)
    (b / "train/images/00003.png.77.part").write_bytes(b"half")
    (b / ".unseen.unfinished").touch()                              # killed between its last scene and the end
    assert module.prepare(str(b), 32, unlabelled=3) == 2 and files(a) == files(b)
    assert module.prepare(str(b), 32, unlabelled=3) == 0


def test_shapes_pair_folder(tmp_path, monkeypatch):
    module = small(monkeypatch)
    module.prepare(str(tmp_path), 48, limit_train=5)
    for split, count in (("train", 5), ("val", 4), ("unseen", 6)):
        classes = json.load(open(tmp_path / split / "classes.json"))
        assert [c["name"] for c in classes] == module.CLASSES and len(classes) >= 10
        assert set(json.load(open(tmp_path / split / "words.json"))) == set(module.CLASSES)
        for kind in ("images", "masks", "instances", "captions"):
            assert len(os.listdir(tmp_path / split / kind)) == count
        for name in os.listdir(tmp_path / split / "masks"):
            mask = Image.open(tmp_path / split / "masks" / name)
            assert mask.mode == "P" and mask.size == (48, 48)
            assert Image.open(tmp_path / split / "images" / name).mode == "RGB"
            assert Image.open(tmp_path / split / "instances" / name).mode == "L"
    colours = module.palette(13).tolist()                           # 15 codes, 3 levels a channel
    assert len({tuple(c) for c in colours}) == 15 and colours[2] == [0, 0, 255] and colours[9] == [0, 128, 0]
    assert module.palette(150)[[1, 2, 6]].tolist() == [[0, 0, 51], [0, 0, 102], [51, 0, 0]]


@pytest.mark.parametrize("style", ["day", "night", "fog", "ink"])
def test_shapes_captions_masks_and_instances_agree(style):
    module = shapes_shapes()
    for i in range(60):
        s = module.scene(np.random.default_rng((7, i)), 64, style)
        mask, instances = s["mask"], s["instances"]
        assert mask.max() <= len(module.CLASSES) and mask.min() >= 1 and s["image"].shape == (64, 64, 3)
        area = dict(zip(module.CLASSES, np.bincount(mask.ravel(), minlength=len(module.CLASSES) + 1)[1:]))
        things = np.isin(mask, [module.CLASSES.index(n) + 1 for n in module.THINGS])
        assert ((instances > 0) == things).all() and area["sky"] > 0
        for k in range(1, instances.max() + 1):
            assert len(np.unique(mask[instances == k])) == 1        # numbered without gaps, one class each
        for k, caption in enumerate(s["captions"]):
            words = set(re.findall("[a-z]+", caption))
            named = {n for n in module.CLASSES if words & set(module.WORDS[n])}
            assert all(area[n] >= 12 for n in named), caption
            assert len(caption.encode()) <= 110 and caption.strip() == caption and named
            if k == 0:                                              # a thing of four specks may go unnamed
                assert all(n in named for n in module.THINGS if area[n] >= 48), caption


def test_shapes_counts_in_captions_are_true():
    module, told = shapes_shapes(), 0
    for i in range(60):
        s = module.scene(np.random.default_rng((8, i)))
        pairs = np.unique(np.stack([s["mask"].ravel(), s["instances"].ravel()]), axis=1).T
        for noun in ("house", "tree", "boat"):
            k = module.CLASSES.index(noun) + 1
            large = [p for p in pairs if p[0] == k and (s["instances"] == p[1]).sum() >= 12]
            for number, word in ((2, "two"), (3, "three")):
                if re.search(rf"\b{word}( \w+)? {noun}s\b", s["captions"][0]):
                    assert len(large) == number, s["captions"][0]
                    told += 1
    assert told > 10


def test_shapes_scale_with_size_and_differ_with_seed():
    module = shapes_shapes()
    for i in range(10):
        a, b, c = (module.scene(np.random.default_rng((s, i)), n) for s, n in ((1, 32), (1, 96), (2, 32)))
        assert (a["mask"] == b["mask"][1::3, 1::3]).mean() > .95    # one geometry, two resolutions
        assert (a["image"] != c["image"]).any()


def test_shapes_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    run = lambda *flags: subprocess.run([sys.executable, SHAPES, *map(str, flags)], capture_output=True, text=True)
    for flags in (("--size", 8), ("--limit-train", -1), ("--limit-train", 0), ("--unlabelled", -5), ("--seed", -1),
                  ("--out", tmp_path / "file"), ("--processes", 0)):
        r = run("--out", tmp_path / "never", *flags)
        assert r.returncode != 0 and len(r.stderr.strip().splitlines()) == 1, (flags, r.stderr)
        assert "Traceback" not in r.stderr and not (tmp_path / "never").exists()


def test_shapes_refuses_to_mix_worlds(tmp_path, monkeypatch):
    module = small(monkeypatch)
    module.prepare(str(tmp_path), 32)
    for options in (dict(size=48), dict(size=32, seed=1), dict(size=32, limit_train=3)):
        before = files(tmp_path)
        with pytest.raises(SystemExit, match="--out"):
            module.prepare(str(tmp_path), **options)
        assert files(tmp_path) == before


def test_shapes_survives_sigkill(tmp_path):
    command = [sys.executable, SHAPES, "--size", "16", "--limit-train", "40", "--out"]
    subprocess.run([*command, str(tmp_path / "calm")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not os.path.isdir(tmp_path / "killed/unseen/images")
                                      or not os.listdir(tmp_path / "killed/train/images")):
        time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {".train.unfinished", ".unseen.unfinished"} <= set(os.listdir(tmp_path / "killed"))
    time.sleep(1)                                                   # its workers end their chunk
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    assert files(tmp_path / "calm") == files(tmp_path / "killed")


# ======================================== data/camvid, data/ade20k, data/coco

SAMPLES = os.environ.get("SEGGEN_TEST_DATA")
real = pytest.mark.skipif(not SAMPLES, reason="SEGGEN_TEST_DATA is not set")


def call(script, *args, ok=True):
    """Run a data script; -> its stdout, or the one line of its error."""
    done = subprocess.run([sys.executable, REPO / "data" / script, *map(str, args)], capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr
    if ok:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if "pairs/s" not in line and "images/s" not in line and line]
    assert len(lines) == 1 and "looked for" in lines[0] and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def ids(path):
    return np.asarray(Image.open(path))


def snapshot(folder):
    """{path: bytes} of every file, and no temporary one among them."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}
    assert not [name for name in files if ".part" in name]
    return files


def colours(classes):
    b = min(b for b in range(2, 7) if b ** 3 >= classes + 2)
    return [[min(255, round(255 / (b - 1)) * d) for d in (v // b % b, v // b ** 2, v % b)] for v in range(classes + 2)]


# ---- drawn raw sets, so that most of it is tested without samples

def raw_camvid(root, count=6):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(count):
            for kind, array in (("", rng.integers(0, 255, (18, 24, 3))), ("annot", rng.integers(0, 12, (18, 24)))):
                (root / (split + kind)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(root / (split + kind) / f"{split}_{i}.png")
    return root


def raw_ade(root, instances=True):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    names = "".join(f"{k}\t0.1\t1\t1\tclass{k}, other name\n" for k in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)
    for i, part in enumerate(("training", "training", "validation")):
        name, label = f"ADE_{part[:5]}_{i:08d}", np.zeros((20, 30), np.uint8)
        if i != 1:
            label[:10], label[10:, :20] = 1, 8           # wall and (i = 1 stays blank) beds
        marked = np.zeros((20, 30, 3), np.uint8)
        marked[5:15, :8] = 1, 7, 0                       # a bed, half of it over the wall
        marked[10:15, 10:15] = 1, 255, 0                 # another
        for kind, ending, array in (("images", ".jpg", rng.integers(0, 255, (20, 30, 3))),
                                    ("annotations", ".png", label), ("annotations_instance", ".png", marked)):
            if kind != "annotations_instance" or instances:
                (root / kind / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(root / kind / part / (name + ending))
    return root


def raw_coco(root, segments, size=(40, 50), beside=True):
    """One image with (segment id, category, crowd, rows, columns) rectangles; categories 3 and 90 things, 200 stuff."""
    pngs = root / "annotations/panoptic_val2017" if beside else root / "panoptic_val2017"
    for folder in (pngs, root / "val2017", root / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    code = np.zeros(size, np.int64)
    for number, _, _, rows, columns in segments:
        code[rows, columns] = number
    Image.fromarray(np.stack([code % 256, code // 256 % 256, code >> 16], -1).astype(np.uint8)).save(pngs / "000000000007.png")
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root / "val2017/000000000007.jpg")
    info = [{"id": s[0], "category_id": s[1], "iscrowd": s[2]} for s in segments]
    data = {"images": [{"id": 7, "file_name": "000000000007.jpg", "height": size[0], "width": size[1]}],
            "annotations": [{"image_id": 7, "file_name": "000000000007.png", "segments_info": info}],
            "categories": [{"id": 200, "name": "rug-merged", "isthing": 0}, {"id": 3, "name": "car", "isthing": 1},
                           {"id": 90, "name": "toothbrush", "isthing": 1}]}
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps(data))
    return root


FEW = [(300, 3, 0, slice(0, 10), slice(0, 10)), (70000, 3, 0, slice(0, 10), slice(10, 30)),
       (5, 3, 1, slice(10, 20), slice(0, 9)), (9, 200, 0, slice(20, 40), slice(0, 50))]


# ---- camvid

def test_camvid_labels_are_shifted_and_void_is_zero(tmp_path):
    raw, out = raw_camvid(tmp_path / "raw"), tmp_path / "out"
    call("camvid/prepare.py", "--root", raw, "--out", out)
    for split in ("train", "val"):
        classes = json.loads((out / split / "classes.json").read_text())
        assert len(classes) == 11 and not any(c["isthing"] for c in classes)
        assert [c["source_id"] for c in classes] == list(range(11)) and classes[8]["name"] == "car"
        for file in sorted((raw / split).iterdir()):
            label, mask = ids(raw / (split + "annot") / file.name), Image.open(out / split / "masks" / file.name)
            assert mask.mode == "P" and np.array_equal(np.asarray(mask), (label + 1) % 12)
            assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(colours(11))[np.asarray(mask)])
            assert (out / split / "images" / file.name).resolve() == file.resolve()
            lines = (out / split / "captions" / (file.stem + ".txt")).read_text().splitlines()
            assert len(lines) == len(set(lines)) == 3 and "road" in lines[0]
    assert not (out / "train/instances").exists()


def test_camvid_captions_name_what_is_there(tmp_path):
    raw = raw_camvid(tmp_path / "raw", 1)
    label = np.full((18, 24), 11, np.uint8)
    label[:12], label[12:] = 5, 8                                    # trees over cars, nothing else
    Image.fromarray(label).save(raw / "trainannot/train_0.png")
    Image.fromarray(np.full_like(label, 11)).save(raw / "valannot/val_0.png")      # all void
    call("camvid/prepare.py", "--root", raw, "--out", tmp_path)
    long = (tmp_path / "train/captions/train_0.txt").read_text().splitlines()[0]
    assert "many trees" in long and "cars" in long and "without sky" in long
    assert not any(word in long for word in ("road", "pedestrian", "pole", "building"))
    assert (tmp_path / "val/captions/val_0.txt").read_text().startswith("a ")


def test_camvid_size_resizes_masks_by_nearest(tmp_path):
    raw = raw_camvid(tmp_path / "raw")
    call("camvid/prepare.py", "--root", raw, "--out", tmp_path, "--size", "13x7")
    for file in (tmp_path / "train/masks").iterdir():
        wanted = Image.fromarray((ids(raw / "trainannot" / file.name) + 1) % 12).resize((13, 7), Image.NEAREST)
        assert np.array_equal(ids(file), np.asarray(wanted))
        image = tmp_path / "train/images" / file.name
        assert Image.open(image).size == (13, 7) and not image.is_symlink()
    assert "earlier run" in call("camvid/prepare.py", "--root", raw, "--out", tmp_path, ok=False)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    raw = raw_camvid(tmp_path / "raw", 150)
    call("camvid/prepare.py", "--root", raw, "--out", tmp_path / "whole", "--size", "80x60")
    command = [sys.executable, REPO / "data/camvid/prepare.py", "--root", raw, "--out", tmp_path / "out",
               "--size", "80x60"]
    count = lambda: len(list(tmp_path.glob("out/*/images/*.png")))
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while running.poll() is None and count() < 20:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 0 < count() < 300 and not list(tmp_path.glob("out/*/classes.json"))
    for image in tmp_path.glob("out/*/images/*.png"):                # an image means a whole pair
        assert ids(image.parents[1] / "masks" / image.name).shape == (60, 80)
    (tmp_path / "out/train/.masks-1-a.png.part").write_bytes(b"cut short")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/images/*.png")}
    subprocess.run(command, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_camvid_bad_input_is_one_line(tmp_path):
    out = tmp_path / "out"

    def error(change, *args):
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        raw = raw_camvid(tmp_path / "raw", 2)
        change(raw)
        shutil.rmtree(out, ignore_errors=True)
        line = call("camvid/prepare.py", "--root", raw, "--out", out, *args, ok=False)
        images = {f.stem for f in out.glob("*/images/*")}
        assert images == {f.stem for f in out.glob("*/masks/*")} == {f.stem for f in out.glob("*/captions/*")}
        assert not list(out.glob("*/classes.json"))                      # no reader takes what is left for a whole set
        return line

    assert "trainannot" in error(lambda raw: shutil.rmtree(raw / "trainannot"))
    assert "train" in error(lambda raw: [shutil.rmtree(f) for f in raw.iterdir()])
    assert "train_1" in error(lambda raw: (raw / "train/train_1.png").unlink())
    assert "val_0" in error(lambda raw: (raw / "valannot/val_0.png").unlink())
    assert "9 x 9" in error(lambda raw: Image.new("L", (9, 9)).save(raw / "trainannot/train_0.png"))
    assert "RGB" in error(lambda raw: Image.new("RGB", (24, 18)).save(raw / "trainannot/train_0.png"))
    assert "found 12" in error(lambda raw: Image.new("L", (24, 18), 12).save(raw / "trainannot/train_0.png"))
    for name in ("train", "trainannot"):
        cut = lambda raw: (raw / name / "train_0.png").write_bytes((raw / name / "train_0.png").read_bytes()[:-60])
        assert f"{name}/train_0.png" in error(cut)
        assert f"{name}/train_0.png" in error(lambda raw: (raw / name / "train_0.png").write_text("no picture"))
    assert "positive" in error(lambda raw: None, "--size", "0x5") and "positive" in error(lambda raw: None, "--size", "a")
    assert "earlier" not in call("camvid/prepare.py", "--root", tmp_path / "nowhere", "--out", out, ok=False)
    (tmp_path / "file").write_text("")
    assert "--out" in call("camvid/prepare.py", "--root", tmp_path / "raw", "--out", tmp_path / "file/x", ok=False)


# ---- ade20k

def test_ade_instances_agree_with_the_mask(tmp_path):
    raw = raw_ade(tmp_path / "raw")
    call("ade20k/prepare.py", "--root", raw, "--out", tmp_path)
    classes = json.loads((tmp_path / "train/classes.json").read_text())
    assert len(classes) == 150 and sum(c["isthing"] for c in classes) == 100 and classes[7]["isthing"]
    assert classes[0] == {"name": "class1", "isthing": False, "source_id": 1}
    name = "ADE_train_00000000.png"
    mask, instances = ids(tmp_path / "train/masks" / name), ids(tmp_path / "train/instances" / name)
    assert np.array_equal(mask, ids(raw / "annotations/training" / name))
    wanted = np.zeros((20, 30), int)
    wanted[10:, :20], wanted[10:15, :8], wanted[10:15, 10:15] = 255, 1, 2
    assert np.array_equal(instances, wanted)
    blank = "ADE_train_00000001"
    assert not ids(tmp_path / f"train/masks/{blank}.png").any() and not ids(tmp_path / f"train/instances/{blank}.png").any()
    assert (tmp_path / f"train/captions/{blank}.txt").read_text().strip()


def test_ade_without_instances_has_no_things(tmp_path):
    call("ade20k/prepare.py", "--root", raw_ade(tmp_path / "raw", False), "--out", tmp_path)
    assert not any(c["isthing"] for c in json.loads((tmp_path / "train/classes.json").read_text()))
    assert not (tmp_path / "train/instances").exists()


@pytest.mark.parametrize("text", [
    json.dumps({"ADE_train_00000000": "twin beds", "ADE_train_00000001.jpg": ["a", "b"]}),
    json.dumps([{"image": "x/ADE_train_00000000.jpg", "caption": "twin\nbeds"}, {"name": "ADE_train_00000001", "text": "a"},
                {"name": "ADE_train_00000001", "text": "b"}]),
    '{"file_name": "ADE_train_00000000.jpg", "caption": "twin beds"}\n\n{"ADE_train_00000001": ["a", "b"]}\n'])
def test_caption_files_in_any_usual_form(tmp_path, text):
    raw = raw_ade(tmp_path / "raw", False)
    (tmp_path / "captions.jsonl").write_text(text)
    call("ade20k/prepare.py", "--root", raw, "--out", tmp_path)
    image = tmp_path / "train/images/ADE_train_00000000.jpg"
    then = image.lstat().st_mtime_ns
    assert "1 of 1" in call("ade20k/prepare.py", "--root", raw, "--out", tmp_path, "--captions", tmp_path / "captions.jsonl")
    read = lambda i: (tmp_path / f"train/captions/ADE_train_{i:08d}.txt").read_text()
    assert read(0) == "twin beds\n" and read(1) == "a\nb\n" and image.lstat().st_mtime_ns == then
    for wrong in ("", "[]", "{}", "[1, 2]", '{"a": 3}', "{", '"text"'):
        (tmp_path / "wrong.json").write_text(wrong)
        call("ade20k/prepare.py", "--root", raw, "--out", tmp_path, "--captions", tmp_path / "wrong.json", ok=False)


def test_ade_bad_input_is_one_line(tmp_path):
    def error(change):
        shutil.rmtree(tmp_path, ignore_errors=True)
        raw = raw_ade(tmp_path / "raw")
        change(raw)
        line = call("ade20k/prepare.py", "--root", raw, "--out", tmp_path / "out", ok=False)
        assert not list(tmp_path.glob("out/*/classes.json"))
        return line

    label = "annotations/training/ADE_train_00000000.png"
    assert "objectInfo150" in error(lambda raw: (raw / "objectInfo150.txt").unlink())
    assert "found 149" in error(lambda raw: (raw / "objectInfo150.txt").write_text(
        "\n".join((raw / "objectInfo150.txt").read_text().splitlines()[:-1])))
    assert "images" in error(lambda raw: shutil.rmtree(raw / "images"))
    assert "ADE_train_00000000" in error(lambda raw: (raw / label).unlink())
    assert "found 151" in error(lambda raw: Image.new("L", (30, 20), 151).save(raw / label))
    assert "RGB" in error(lambda raw: Image.new("RGB", (30, 20)).save(raw / label))
    assert "(31, 20)" in error(lambda raw: Image.new("L", (31, 20)).save(raw / label))
    assert "found L" in error(lambda raw: Image.new("L", (30, 20)).save(raw / label.replace("tions/", "tions_instance/")))
    assert "sceneCategories" in error(lambda raw: (raw / "sceneCategories.txt").write_bytes(b"ADE_train_1 \xff"))
    image = "images/training/ADE_train_00000000.jpg"
    assert image in error(lambda raw: (raw / image).write_bytes((raw / image).read_bytes()[:-200]))


# ---- coco

@pytest.mark.parametrize("beside", [True, False])
def test_coco_views_of_a_drawn_image(tmp_path, beside):
    assert "1 of 1" in call("coco/prepare.py", "--root", raw_coco(tmp_path / "raw", FEW, beside=beside), "--out", tmp_path)
    folder, name = tmp_path / "val", "000000000007.png"
    classes = json.loads((folder / "classes.json").read_text())
    assert [(c["source_id"], c["isthing"]) for c in classes] == [(3, True), (90, True), (200, False)]
    mask, instances = np.zeros((40, 50)), np.zeros((40, 50))
    mask[:10, :30], mask[10:20, :9], mask[20:] = 1, 1, 3
    instances[:10, :10], instances[:10, 10:30], instances[10:20, :9] = 2, 1, 255
    assert np.array_equal(ids(folder / "masks" / name), mask) and np.array_equal(ids(folder / "instances" / name), instances)
    assert "many cars with rug" in (folder / "captions/000000000007.txt").read_text()


def test_coco_with_more_than_254_things_loses_none(tmp_path):
    many = [(1000 + 50 * r + c, 3 if r < 5 else 90, 0, slice(r, r + 1), slice(c, c + 1)) for r in range(8) for c in range(50)]
    call("coco/prepare.py", "--root", raw_coco(tmp_path / "raw", many), "--out", tmp_path)
    call("coco/export.py", tmp_path / "val", "--out", tmp_path / "back")
    info = json.loads((tmp_path / "back/panoptic.json").read_text())["annotations"][0]["segments_info"]
    assert len(info) == 400 and sum(s["category_id"] == 3 for s in info) == 250 and not any(s["iscrowd"] for s in info)
    more = many + [(5000 + 50 * r + c, 3, 0, slice(r, r + 1), slice(c, c + 1)) for r in (8, 9) for c in range(50)]
    call("coco/prepare.py", "--root", raw_coco(tmp_path / "raw2", more), "--out", tmp_path / "2")
    mask, instances = (ids(tmp_path / "2/val" / kind / "000000000007.png") for kind in ("masks", "instances"))
    assert len(np.unique(instances[mask == 1])) == 255 and (instances[mask == 1] == 255).sum() == 350 - 254


def test_coco_bad_input_is_one_line(tmp_path):
    def error(change, segments=FEW):
        shutil.rmtree(tmp_path, ignore_errors=True)
        raw = raw_coco(tmp_path / "raw", segments)
        change(raw)
        line = call("coco/prepare.py", "--root", raw, "--out", tmp_path / "out", ok=False)
        assert not list(tmp_path.glob("out/val/*/*")) and not (tmp_path / "out/val/classes.json").exists()
        return line

    def edit(change):
        def apply(raw):
            path = raw / "annotations/panoptic_val2017.json"
            data = json.loads(path.read_text())
            change(data)
            path.write_text(json.dumps(data))
        return apply

    png, photo = "annotations/panoptic_val2017/000000000007.png", "val2017/000000000007.jpg"
    assert "panoptic_val2017.json" in error(lambda raw: shutil.rmtree(raw / "annotations"))
    assert "not in its JSON" in error(edit(lambda d: d["annotations"][0]["segments_info"].pop()))
    assert "not in the PNG" in error(edit(lambda d: d["annotations"][0]["segments_info"].append(
        {"id": 77, "category_id": 3, "iscrowd": 0})))
    assert "found id 4" in error(edit(lambda d: d["annotations"][0]["segments_info"][0].update(category_id=4)))
    for spoil in (lambda s: s.pop("category_id"), lambda s: s.pop("id"), lambda s: s.update(category_id=None), lambda s: s.update(id=[1])):
        assert "category_id" in error(edit(lambda d: spoil(d["annotations"][0]["segments_info"][0])))
    assert "annotations with image_id" in error(edit(lambda d: d["annotations"][0].update(image_id=[7])))
    assert "only an image for 8" in error(edit(lambda d: d["images"].append({"id": 8, "file_name": "8.jpg"})))
    assert "only an annotation for 7" in error(edit(lambda d: d["images"][0].update(id=9)))
    assert "categories" in error(edit(lambda d: d.pop("categories")))
    assert "categories with id" in error(edit(lambda d: d.update(categories=5)))
    assert "categories with id" in error(edit(lambda d: d["categories"][0].update(name=None)))
    for part in ("images", "categories", "annotations"):
        assert f"each of {part} once" in error(edit(lambda d: d[part].append(d[part][0])))
    assert "each segment once" in error(edit(lambda d: d["annotations"][0]["segments_info"].append(
        d["annotations"][0]["segments_info"][0])))
    assert "annotations with image_id, file_name" in error(edit(lambda d: d["annotations"][0].pop("file_name")))
    assert "categories with id, name, isthing" in error(edit(lambda d: d["categories"][1].pop("isthing")))
    assert png.split("/")[1] in error(lambda raw: (raw / png).unlink())
    assert "val2017" in error(lambda raw: (raw / photo).unlink())
    assert "val2017" in error(lambda raw: shutil.rmtree(raw / "val2017"))
    assert "mode L" in error(lambda raw: Image.new("L", (50, 40)).save(raw / png))
    assert "(9, 9)" in error(lambda raw: Image.new("RGB", (9, 9)).save(raw / png))
    assert photo in error(lambda raw: (raw / photo).write_bytes((raw / photo).read_bytes()[:300]))
    assert "JSON file" in error(lambda raw: (raw / "annotations/panoptic_val2017.json").write_text("{"))


def test_export_takes_scores_where_there_are_some(tmp_path):
    call("coco/prepare.py", "--root", raw_coco(tmp_path / "raw", FEW), "--out", tmp_path)
    folder, name = tmp_path / "val", "000000000007"
    call("coco/export.py", folder)
    found = json.loads((folder / "coco/results.json").read_text())
    assert len(found) == 2 and {one["score"] for one in found} == {1.0}
    (folder / "results").mkdir()
    assert f"{name}.json" in call("coco/export.py", folder, ok=False)
    for wrong in ("[", '[{"score": 0.5}]', "7"):
        (folder / f"results/{name}.json").write_text(wrong)
        assert f"{name}.json" in call("coco/export.py", folder, ok=False)
    kept = [{"image_id": name, "score": s, **{k: found[0][k] for k in ("category_id", "segmentation")}} for s in (0.9, 0.2)]
    (folder / f"results/{name}.json").write_text(json.dumps(kept))
    call("coco/export.py", folder)
    assert json.loads((folder / "coco/results.json").read_text()) == [dict(one, image_id=7) for one in kept]


def test_export_refuses_what_is_no_pair_folder(tmp_path):
    raw = raw_coco(tmp_path / "raw", FEW)
    call("coco/prepare.py", "--root", raw, "--out", tmp_path)
    folder, name = tmp_path / "val", "000000000007.png"
    keep = (folder / "masks" / name).read_bytes()
    assert "classes.json" in call("coco/export.py", tmp_path / "raw", ok=False)
    for wrong, word in ((Image.new("L", (50, 40), 4), "found 4"), (Image.new("RGB", (50, 40)), "RGB"),
                        (Image.new("L", (9, 9)), "(9, 9)")):
        wrong.save(folder / "masks" / name)
        assert word in call("coco/export.py", folder, "--out", tmp_path / "x", ok=False) and not (tmp_path / "x").exists()
    (folder / "masks" / name).write_bytes(keep)
    call("coco/export.py", folder, "--out", tmp_path / "x")
    before = snapshot(tmp_path / "x")
    Image.new("RGB", (50, 40)).save(folder / "masks" / name)
    assert "RGB" in call("coco/export.py", folder, "--out", tmp_path / "x", ok=False)
    assert snapshot(tmp_path / "x") == before                            # one that failed leaves the earlier one
    (folder / "masks" / name).write_bytes(keep)
    assert "--out" in call("coco/export.py", folder, "--out", raw / "val2017/000000000007.jpg/x", ok=False)
    (folder / "images/000000000007.jpg").rename(folder / "images/8.jpg")
    call("coco/export.py", folder, "--out", tmp_path / "x", ok=False)


@real
def test_coco_round_trip_gives_the_official_segments(tmp_path):
    raw = Path(SAMPLES, "coco")
    call("coco/prepare.py", "--root", raw, "--out", tmp_path)
    for split in ("train", "val"):
        call("coco/export.py", tmp_path / split, "--out", tmp_path / "back")
        theirs = json.loads((raw / f"annotations/panoptic_{split}2017.json").read_text())
        ours = json.loads((tmp_path / "back/panoptic.json").read_text())
        assert {(c["id"], c["name"], c["isthing"]) for c in ours["categories"]} == {
            (c["id"], c["name"], c["isthing"]) for c in theirs["categories"]}
        marked = {a["image_id"]: a for a in theirs["annotations"]}
        assert sorted(marked) == [a["image_id"] for a in ours["annotations"]]
        for one in ours["annotations"]:
            other = marked[one["image_id"]]
            maps = [ids(folder / a["file_name"]).astype(np.int64) @ [1, 256, 65536] for folder, a in (
                (tmp_path / "back/panoptic", one), (raw / f"annotations/panoptic_{split}2017", other))]
            joined = np.unique(maps[0] << 24 | maps[1])                             # one to one, pixel by pixel
            joined = np.stack([joined >> 24, joined & 0xFFFFFF], 1)
            mine, his = ({0: None} | {s["id"]: (s["category_id"], s["iscrowd"], s["area"], s["bbox"])
                                      for s in a["segments_info"]} for a in (one, other))
            assert len(joined) == len(np.unique(joined[:, 0])) == len(np.unique(joined[:, 1])) and len(mine) == len(his)
            assert all(mine[a] == his[b] for a, b in joined.tolist())


@real
def test_coco_export_is_read_by_pycocotools(tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    call("coco/prepare.py", "--root", Path(SAMPLES, "coco"), "--out", tmp_path)
    assert len((tmp_path / "val/captions/000000000139.txt").read_text().splitlines()) >= 5      # COCO's own
    call("coco/export.py", tmp_path / "val", "--out", tmp_path / "back")
    truth = COCO(tmp_path / "back/instances.json")
    for kind in ("segm", "bbox"):
        score = COCOeval(truth, truth.loadRes(str(tmp_path / "back/results.json")), kind)
        score.params.maxDets = [1, 10, 300]
        score.evaluate(), score.accumulate()
        precision = score.eval["precision"][:, :, :, 0, -1]
        assert precision[precision > -1].min() > 0.999
    first = truth.loadAnns(truth.getAnnIds(139))[0]
    mask = truth.annToMask(first)
    assert mask.sum() == first["area"] and mask.shape == ids(tmp_path / "val/masks/000000000139.png").shape


def perfect(pairs):
    """The metrics of the truth taken as a prediction."""
    meters = T.Confusion(pairs.classes), T.PanopticQuality(pairs.classes), T.AveragePrecision(pairs.classes)
    things = {k for k, c in enumerate(pairs.classes, 1) if c["isthing"]}
    for ids_, parts in (pairs[i][1].numpy() for i in range(len(pairs))):
        meters[0].add(ids_.astype(np.int64), ids_)
        meters[1].add((ids_.astype(np.int64), parts.astype(np.int64)), (ids_, parts))
        found = {(c, n) for c, n in np.unique(np.stack([ids_.ravel(), parts.ravel()]), axis=1).T.tolist()
                 if c in things and n < T.CROWD}
        meters[2].add([(ids_ == c) & (parts == n) for c, n in found], [c for c, _ in found], [0.9] * len(found), (ids_, parts))
    return {k: v for meter in meters for k, v in meter.result().items()}


@real
def test_coco_sample_through_every_task(tmp_path):
    """Prepare, a few pairs; perfect predictions score 100; train, evaluate, predict and export with every task."""
    from pycocotools.coco import COCO
    call("coco/prepare.py", "--root", Path(SAMPLES, "coco"), "--out", tmp_path / "all")
    for split, first in (("train", 0), ("val", 10)):
        for kind in ("images", "masks", "instances"):
            (tmp_path / "few" / split / kind).mkdir(parents=True)
            for path in sorted((tmp_path / "all" / split / kind).iterdir())[first:first + 4]:
                shutil.copy(path, tmp_path / "few" / split / kind)
        shutil.copy(tmp_path / "all" / split / "classes.json", tmp_path / "few" / split)
    best = perfect(T.Pairs(tmp_path / "few/val"))
    assert all(np.isnan(v) or k == "absent" or np.isclose(v, 100) for k, v in best.items()), best
    for task in T.SCORE:
        out = tmp_path / task
        T.go(T.flags().parse_args(["--data", str(tmp_path / "few"), "--task", task, "--steps", "2", "--batch", "2",
                                   "--size", "64", "--device", "cpu", "--out", str(out)]))
        scores = json.loads((out / "metrics.json").read_text())["val"]
        assert scores["images"] == 4 and 0 <= scores[T.SCORE[task]] < 50, (task, scores)
        T.go(T.flags().parse_args(["--data", str(tmp_path / "few"), "--task", task, "--size", "64", "--eval-only",
                                   "--device", "cpu", "--out", str(out), "--predictions", str(out / "said")]))
        assert "4 images" in call("coco/export.py", out / "said/val")
        said = json.loads((out / "said/val/coco/panoptic.json").read_text())
        assert [a["file_name"] for a in said["annotations"]] == sorted(p.name for p in (out / "said/val/masks").iterdir())
        assert (task == "semantic") == (not (out / "said/val/results").exists())
        for path in (out / "said/val/results").glob("*.json"):
            assert all({"image_id", "category_id", "segmentation", "score"} <= set(r) for r in json.loads(path.read_text()))
        if task != "semantic":
            found = COCO(out / "said/val/coco/instances.json").loadRes(str(out / "said/val/coco/results.json"))
            assert len({a["score"] for a in found.anns.values()}) > 10


@real
def test_pq_of_the_coco_sample_equals_the_definition(tmp_path):
    """At a quarter of the resolution: crowds, void, shifted, renamed, merged and lost segments."""
    call("coco/prepare.py", "--root", Path(SAMPLES, "coco"), "--out", tmp_path)
    names = sorted(p.name for p in (tmp_path / "val/masks").iterdir())
    maps = [[ids(tmp_path / "val" / kind / name)[::4, ::4] for kind in ("masks", "instances")] for name in names]
    maps = sorted(maps, key=lambda m: -(m[1] == 255).sum())[:25]                            # crowds first
    classes, cases = json.loads((tmp_path / "val/classes.json").read_text()), []
    meter, rng = T.PanopticQuality(classes), np.random.default_rng(0)
    for truth_ids, truth_parts in maps:
        shift = rng.integers(-2, 3, 2)
        guess, parts = (np.roll(m, shift, (0, 1)).astype(np.int64) for m in (truth_ids, truth_parts))
        for c in np.unique(guess)[::5]:
            guess[guess == c] = rng.integers(1, len(classes) + 1)
        parts[parts == 2] = 1
        parts[parts == 255] = 200
        guess[10:30, 20:40], guess[60:80, 10:30] = 0, rng.integers(1, 81)
        cases.append(((guess, parts), (truth_ids, truth_parts)))
        meter.add(*cases[-1])
    slow = slow_pq(cases, [c["isthing"] for c in classes])
    assert (maps[0][1] == 255).any() and any((m[0] == 0).any() for m in maps) and 10 < slow["PQ"] < 90
    for key, value in slow.items():
        assert np.isclose(meter.result()[key], value), key


@real
def test_ade20k_sample_trains_and_is_measured(tmp_path):
    """The paper's recipe on the small preset; perfect predictions score 100."""
    call("ade20k/prepare.py", "--root", Path(SAMPLES, "ADEChallengeData2016"), "--out", tmp_path / "ade", "--size", 64)
    pairs, meter = T.Pairs(tmp_path / "ade/val"), T.Confusion(json.loads((tmp_path / "ade/val/classes.json").read_text()))
    for i in range(3):
        meter.add(pairs[i][1][0].numpy().astype(np.int64), pairs[i][1][0].numpy())
    best = meter.result()
    assert best["mIoU"] == best["pACC"] == 100 and 100 < best["absent"] < 150
    T.go(T.flags().parse_args(["--data", str(tmp_path / "ade"), "--recipe", "ade20k", "--preset", "tiny", "--size", "64",
                               "--steps", "2", "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "out")]))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["val"]
    assert found["images"] == 3 and found["absent"] == best["absent"] and 0 <= found["mIoU"] < 50
    assert json.loads((tmp_path / "out/log.jsonl").read_text())["step"] == 2


@pytest.mark.skipif("SEGGEN_SLOW" not in os.environ, reason="SEGGEN_SLOW is not set: a quarter of an hour")
@real
def test_tiny_overfits_eight_images_of_camvid(tmp_path, monkeypatch):
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    call("camvid/prepare.py", "--root", Path(SAMPLES, "camvid"), "--out", tmp_path / "camvid")
    fill = {tv_tensors.Image: 128, tv_tensors.Mask: 0}
    monkeypatch.setattr(T, "augmentation", lambda recipe, h, w: v2.RandomCrop((h, w), pad_if_needed=True, fill=fill))
    pairs = T.Pairs(tmp_path / "camvid/train", limit=8)
    cfg = config(steps=1800, batch=2, size=[192, 240], lr=2e-3)
    model = T.train(T.build(cfg, pairs.classes, None), T.Batches(pairs, [], cfg), tmp_path / "o", cfg, CPU)
    assert T.evaluate(model, pairs, cfg, CPU)["mIoU"] > 95


@real
def test_samples_of_camvid_and_ade20k(tmp_path):
    ade = Path(SAMPLES, "ADEChallengeData2016")
    call("ade20k/prepare.py", "--root", ade, "--out", tmp_path / "ade", "--size", 64)
    classes = json.loads((tmp_path / "ade/val/classes.json").read_text())
    assert classes[11]["name"] == "sidewalk" and len({c["name"] for c in classes}) == 150
    mask = Image.open(tmp_path / "ade/val/masks/ADE_val_00000001.png")
    assert min(mask.size) == 64 and mask.getpalette()[3:6] == [0, 0, 51] and mask.getpalette()[18:21] == [51, 0, 0]
    assert set(np.unique(mask)) <= set(np.unique(ids(ade / "annotations/validation/ADE_val_00000001.png")))
    call("camvid/prepare.py", "--root", Path(SAMPLES, "camvid"), "--out", tmp_path / "camvid")
    assert [len(list(tmp_path.glob(f"camvid/{s}/images/*"))) for s in ("train", "val", "test")] == [367, 101, 233]
    text = (tmp_path / "camvid/test/captions/0001TP_008550.txt").read_text()
    assert "at dusk" in text and "daylight" not in text


# ======================================== train.py


CLASSES = [{"name": n, "isthing": t, "source_id": i} for i, (n, t) in enumerate(
    [("sky", False), ("grass", False), ("ball", True), ("box", True)], 1)]
COLOURS = np.array([[0, 0, 0], [90, 150, 230], [60, 160, 70], [220, 60, 50], [240, 200, 60]], np.uint8)
CPU = torch.device("cpu")


def scene(rng, size=32):
    """(H, W, 3) image, (H, W) ids, (H, W) instances of sky, grass, balls and boxes."""
    ids, inst = np.ones((size, size), np.uint8), np.zeros((size, size), np.uint8)
    ids[size // 2 + rng.integers(-4, 5):] = 2
    for n in range(1, 4):
        y, x, r, c = *rng.integers(4, size - 4, 2), rng.integers(3, 7), rng.integers(3, 5)
        yy, xx = np.mgrid[:size, :size]
        there = (yy - y) ** 2 + (xx - x) ** 2 < r * r if c == 3 else np.maximum(abs(yy - y), abs(xx - x)) < r
        ids[there], inst[there] = c, n
    image = np.clip(COLOURS[ids] + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
    return image, ids, inst


def folder(path, n=6, seed=0, size=32, classes=CLASSES, instances=True):
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks") + ("instances",) * instances:
        (path / kind).mkdir(parents=True, exist_ok=True)
    (path / "classes.json").write_text(json.dumps(classes))
    for i in range(n):
        image, ids, inst = scene(rng, size)
        Image.fromarray(image).save(path / f"images/{i:03d}.png")
        Image.fromarray(ids).save(path / f"masks/{i:03d}.png")
        if instances:
            Image.fromarray(inst).save(path / f"instances/{i:03d}.png")
    return path


def dataset(path, **more):
    for k, split in enumerate(("train", "val", "unseen")):
        folder(path / split, seed=k, **more)
    return path


def command(*args, cwd):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, str(REPO / "train.py"), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=300)


def config(**more):
    return {**dict(recipe="tiny", preset="tiny", task="semantic", steps=4, batch=2, accumulate=1, seed=0, p_synth=0.6,
                   pretrain=False, size=[32, 32], short=0, longest=0, lr=1e-3, world=1), **more}


def truth(seed, size=48):
    """A truth with void, a crowd and several instances: ids, instances."""
    rng = np.random.default_rng(seed)
    _, ids, inst = scene(rng, size)
    ids[:5, :9] = 0
    inst[:5, :9] = 0
    ids[-8:, :12], inst[-8:, :12] = 3, 255
    return ids, inst


def perturbed(ids, inst, seed):
    """A prediction: shifted, some classes swapped, some segments gone, some on void."""
    rng = np.random.default_rng(seed + 100)
    shift = rng.integers(-2, 3, 2)
    ids, inst = (np.roll(a, shift, (0, 1)).astype(np.int64) for a in (ids, inst))
    inst[inst == 255] = 9
    if seed % 3 == 0:
        ids[inst == 1] = 7 - ids[inst == 1]                           # 3 <-> 4
    ids[20:24, 20:26] = 0
    inst[ids == 0] = 0
    inst[(ids > 2) & (inst == 2)] = 1 if seed % 2 else 2              # two instances run together
    return ids, inst


# ------------------------------------------------------------------------------------------------------ metrics

def test_miou_equals_naive_count():
    meter, pairs = T.Confusion(CLASSES), []
    for seed in range(4):
        ids, _ = truth(seed)
        ids[ids == 4] = 3                                             # class 4 is absent from the truth
        guess = perturbed(ids, np.zeros_like(ids), seed)[0]
        pairs.append((guess, ids))
        meter.add(guess, ids)
    guess, ids = (np.concatenate([p[i].ravel() for p in pairs]) for i in (0, 1))
    guess, ids = guess[ids > 0], ids[ids > 0]
    ious, accs, freq = [], [], []
    for c in (1, 2, 3):
        inter = sum(1 for g, t in zip(guess, ids) if g == c and t == c)
        union = sum(1 for g, t in zip(guess, ids) if g == c or t == c)
        total = sum(1 for t in ids if t == c)
        ious, accs, freq = ious + [inter / union], accs + [inter / total], freq + [total / len(ids)]
    result = meter.result()
    assert result["absent"] == 1
    assert np.isclose(result["mIoU"], 100 * np.mean(ious)) and np.isclose(result["mACC"], 100 * np.mean(accs))
    assert np.isclose(result["fwIoU"], 100 * np.dot(freq, ious))
    assert np.isclose(result["pACC"], 100 * np.mean(guess == ids))


def slow_pq(cases, isthing):
    """Panoptic quality from boolean masks, straight from the definition."""
    stats = {c: [0.0, 0, 0, 0] for c in range(1, len(isthing) + 1)}
    for (gi, gn), (ti, tn) in cases:
        segments = lambda ids, num: {(int(c), int(n)): (ids == c) & ((num == n) | (not isthing[c - 1]))  # noqa: E731
                                     for c, n in {(c, n if isthing[c - 1] else 0) for c, n in
                                                  zip(ids[ids > 0].tolist(), num[ids > 0].tolist())}}
        found, true = segments(gi, gn), segments(ti, tn)
        void, used = ti == 0, set()
        crowd = {key: m for key, m in true.items() if key[1] == 255 and isthing[key[0] - 1]}
        for key, t in true.items():
            if key in crowd:
                continue
            hit = [(k, g) for k, g in found.items() if k[0] == key[0]
                   and (g & t).sum() / ((g | t) & ~(void & g)).sum() > 0.5]
            assert len(hit) <= 1
            if hit:
                used.add(hit[0][0])
                g = hit[0][1]
                stats[key[0]][0] += (g & t).sum() / ((g | t) & ~(void & g)).sum()
                stats[key[0]][1] += 1
            else:
                stats[key[0]][3] += 1
        for key, g in found.items():
            free = void | np.any([m for k, m in crowd.items() if k[0] == key[0]] or [void], axis=0)
            if key not in used and (g & free).sum() / g.sum() <= 0.5:
                stats[key[0]][2] += 1
    rows = {c: (i / max(tp, 1), tp / (tp + fp / 2 + fn / 2)) for c, (i, tp, fp, fn) in stats.items() if tp + fp + fn}
    return {"PQ": 100 * np.mean([s * r for s, r in rows.values()]), "SQ": 100 * np.mean([s for s, _ in rows.values()]),
            "RQ": 100 * np.mean([r for _, r in rows.values()]),
            "PQ_things": 100 * np.mean([s * r for c, (s, r) in rows.items() if isthing[c - 1]]),
            "PQ_stuff": 100 * np.mean([s * r for c, (s, r) in rows.items() if not isthing[c - 1]])}


def test_pq_equals_the_definition():
    cases = []
    for seed in range(12):
        ids, inst = truth(seed)
        guess, numbers = perturbed(ids, inst, seed)
        if seed > 5:
            guess[:5, :9], numbers[:5, :9] = 3, 40                    # lies on void alone: not false
        if seed > 8:
            guess[-8:, :12], numbers[-8:, :12] = 4, 41                # on the crowd of another class: false
        cases.append(((guess, numbers), (ids, inst)))
    meter, other = T.PanopticQuality(CLASSES), T.PanopticQuality(CLASSES)
    for i, case in enumerate(cases):
        (meter if i % 2 else other).add(*case)
    meter.merge(other)                                                # as two ranks would
    result, slow = meter.result(), slow_pq(cases, [c["isthing"] for c in CLASSES])
    assert 5 < slow["PQ"] < 95 and meter.counts[1:].sum(1).min() > 0
    for key, value in slow.items():
        assert np.isclose(result[key], value), key


def test_perfect_predictions_score_100():
    meters = T.Confusion(CLASSES), T.PanopticQuality(CLASSES), T.AveragePrecision(CLASSES)
    for seed in range(5):
        ids, inst = truth(seed)
        guess = inst.astype(np.int64) + (inst == 255) * 1000          # on the crowd, something with the crowd's class
        meters[0].add(ids.astype(np.int64), ids)
        meters[1].add((ids.astype(np.int64), guess), (ids, inst))
        masks = [((ids == c) & (inst == n), c) for c in (3, 4) for n in (1, 2, 3) if ((ids == c) & (inst == n)).any()]
        meters[2].add([m for m, _ in masks], [c for _, c in masks], [0.9] * len(masks), (ids, inst))
    for meter in meters:
        for key, value in meter.result().items():
            assert key == "absent" or np.isnan(value) or np.isclose(value, 100), key


def test_ap_equals_pycocotools():
    from pycocotools import mask as M
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    meters, gts, dts = (T.AveragePrecision(CLASSES), T.AveragePrecision(CLASSES)), [], []
    rng = np.random.default_rng(0)
    for seed in range(10):
        ids, inst = truth(seed, 96)
        gi, gn = perturbed(ids, inst, seed)
        found = [((gi == c) & (gn == n), c, float(rng.random())) for c in (3, 4) for n in range(1, 10)]
        found = [f for f in found if f[0].any()]
        meters[seed >= 5].add(*zip(*found), (ids, inst))
        for c in (3, 4):
            for n in np.unique(inst[ids == c]):
                code = M.encode(np.asfortranarray((ids == c) & (inst == n), np.uint8))
                gts.append(dict(id=len(gts) + 1, image_id=seed, category_id=c, segmentation=code, area=float(M.area(code)),
                                bbox=M.toBbox(code).tolist(), iscrowd=int(n == 255)))
        for m, c, s in found:
            dts.append(dict(image_id=seed, category_id=c, score=s, segmentation=M.encode(np.asfortranarray(m, np.uint8))))
    meters[0].merge(meters[1])
    meters[0].merge(T.AveragePrecision(CLASSES))                      # of a rank without images
    result = meters[0].result()
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = dict(images=[dict(id=i, height=96, width=96) for i in range(10)], annotations=gts, info={},
                          categories=[dict(id=c, name=str(c)) for c in (3, 4)])
        gt.createIndex()
        dt = gt.loadRes(dts)
        for kind, end in (("segm", ""), ("bbox", "_box")):
            judge = COCOeval(gt, dt, kind)
            judge.evaluate(), judge.accumulate(), judge.summarize()
            for key, value in zip(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), judge.stats):
                value = 100 * value if value >= 0 else np.nan
                assert np.isclose(result[key + end], value, equal_nan=True), (kind, key, result[key + end], value)
    assert 5 < result["AP"] < 95


def test_ap_keeps_little_of_an_image():
    meter, rng = T.AveragePrecision([dict(name=str(k), isthing=True) for k in range(30)]), np.random.default_rng(0)
    masks = [np.roll(np.tri(32) > 0, n, (0, 1)) for n in rng.integers(0, 32, 100)]
    meter.add(masks, list(rng.integers(1, 31, 100)), list(rng.random(100)), (np.ones((32, 32), np.uint8),) * 2)
    assert len(pickle.dumps(meter)) < 20_000 and 0 <= meter.result()["AP"] < 100


def test_multi_scale_evaluation_equals_predict(tmp_path, capsys):
    data, cfg = dataset(tmp_path / "d", n=2), config(steps=20)
    pairs, meter = T.Pairs(data / "val"), T.Confusion(CLASSES)
    model = T.train(T.build(cfg, CLASSES, None), T.Batches(pairs, [], cfg), tmp_path / "o", cfg, CPU)
    for image, labels in (pairs[i] for i in range(2)):
        found = m2f.predict(model, image / 255, "semantic", scales=(0.5, 0.75, 1, 1.25, 1.5, 1.75), flip=True)
        meter.add(found.numpy() + 1, labels[0].numpy())
    result = T.evaluate(model, pairs, cfg, CPU, multi_scale=True)
    assert result == dict(images=2, **meter.result()) != T.evaluate(model, pairs, cfg, CPU)
    flags = ["--data", str(data), "--multi-scale", "--device", "cpu", "--splits", "val", "--out", str(tmp_path / "o")]
    T.go(T.flags().parse_args([*flags, "--eval-only"]))
    assert f"mIoU {result['mIoU']:.1f}" in capsys.readouterr().out
    for wrong in ([], ["--eval-only", "--task", "panoptic"], ["--eval-only", "--predictions", "x"]):
        with pytest.raises(T.BadInput, match="--multi-scale"):
            T.go(T.flags().parse_args([*flags, *wrong]))


def test_two_ranks_measure_what_one_measures(tmp_path):
    """Trained and measured under torchrun; unseen has an image for one of the ranks only."""
    data = dataset(tmp_path / "d", n=5)
    for path in data.glob("unseen/*/00[1-4].png"):
        path.unlink()
    flags = ["--data", data, "--task", "panoptic", "--size", 32, "--steps", 2, "--device", "cpu", "--out", tmp_path / "o"]
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29581",
                          str(REPO / "train.py"), *map(str, flags)], cwd=tmp_path, capture_output=True, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "o/metrics.json").read_text())
    real = T.Pairs(data / "train")
    cfg = T.settings(T.flags().parse_args([str(f) for f in flags]), real, [], 1)
    model = m2f.load(tmp_path / "o", "panoptic")
    for split, images in (("val", 5), ("unseen", 1)):
        one = T.evaluate(model, T.Pairs(data / split), cfg, CPU)
        assert one["images"] == images and one["mIoU"] > 0 and set(one) == set(found[split])
        assert all(np.isclose(found[split][k], v, atol=0.05, equal_nan=True) for k, v in one.items()), (found[split], one)


# ------------------------------------------------------------------------------------------------- data and loop

def test_replacement_rate_and_determinism(tmp_path):
    real, synth = (T.Pairs(folder(tmp_path / str(k), seed=k, n=4)) for k in (0, 1))
    batches = T.Batches(real, [synth], config(batch=8, steps=100))
    torch.manual_seed(0)
    drawn = [batches.draw(n, i)[0] for n in range(250) for i in range(8)]
    assert abs(np.mean([p is synth for p in drawn]) - 0.6) < 0.04
    a, b = batches[3], T.Batches(real, [synth], config(batch=8, steps=100))[3]
    assert torch.equal(a[0], b[0]) and all(torch.equal(s["masks"], t["masks"]) for s, t in zip(a[1], b[1]))
    assert not torch.equal(a[0], batches[4][0])
    pre = T.Batches(real, [synth], config(steps=10, pretrain=True))
    assert [pre.draw(n, 0)[0] is synth for n in range(10)] == [True] * 5 + [False] * 5
    order = [T.Batches(real, [], config(batch=4)).draw(n, i)[1] for n in range(2) for i in range(4)]
    assert sorted(order[:4]) == sorted(order[4:]) == [0, 1, 2, 3]     # each pass sees every real pair once


@pytest.mark.parametrize("recipe", ["tiny", "ade20k", "coco"])
def test_image_and_mask_are_augmented_together(tmp_path, recipe):
    from torchvision import tv_tensors
    rng = np.random.default_rng(0)
    _, ids, inst = scene(rng, 48)
    image = torch.from_numpy(np.repeat(ids[None] * 40, 3, 0))         # the image tells the class of each pixel
    torch.manual_seed(0)
    for _ in range(5):
        change = T.augmentation(recipe, 64, 32)
        change = type(change)([t for t in change.transforms if "Color" not in repr(t) and "Photo" not in repr(t)])
        got, labels = change(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(np.stack([ids, inst]))))
        assert got.shape == (3, 64, 32) and labels.shape == (2, 64, 32)
        inside = labels[0] > 0
        assert (got[0][~inside] == 128).float().mean() > 0.6 or not (~inside).any()
        near = (got[0].float() / 40).round().long() == labels[0].long()
        assert near[inside].float().mean() > 0.75                     # all but blended borders
        assert set(labels.unique().tolist()) <= set(range(5))


def test_colours_are_jittered_and_never_swapped():
    from torchvision import tv_tensors
    image, seen = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 64, 64), set()
    torch.manual_seed(0)
    for _ in range(20):
        got, labels = T.augmentation("ade20k", 64, 64)(tv_tensors.Image(image), tv_tensors.Mask(torch.ones(2, 64, 64)))
        colour = got[:, labels[0] > 0].float().mean(1)
        assert colour.argmax() == 0
        seen.add(tuple(colour.round().tolist()))
    assert len(seen) > 10


@pytest.mark.parametrize("recipe", ["tiny", "ade20k", "coco"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_thin_images_keep_a_pixel(recipe, size):
    from torchvision import tv_tensors
    torch.manual_seed(0)
    for _ in range(5):
        got, labels = T.augmentation(recipe, 64, 64)(tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)),
                                                     tv_tensors.Mask(torch.ones(2, *size, dtype=torch.uint8)))
        assert got.shape == (3, 64, 64) and labels.shape == (2, 64, 64)


def test_jitter_is_relative_to_the_crop():
    jitter = T.augmentation("coco", 64, 32).transforms[1]
    jitter.scale_range = 1.0, 1.0
    assert jitter(torch.zeros(3, 200, 100)).shape == (3, 64, 32)


def test_size_and_batch_of_the_recipes(tmp_path):
    real = T.Pairs(folder(tmp_path / "p", n=2, size=40))
    for flags, world, wanted in (
            ("", 1, ([48, 48], 0, 0, 8)), ("--size 64x48", 1, ([48, 64], 48, 192, 8)),
            ("--recipe ade20k", 1, ([512, 512], 512, 2048, 16)), ("--recipe ade20k --size 640", 8, ([640, 640], 640, 2560, 2)),
            ("--recipe coco --size 512 --accumulate 4", 2, ([512, 512], 800, 1333, 2)),
            ("--recipe coco --accumulate 4", 16, ([1024, 1024], 800, 1333, 1)), ("--batch 3 --accumulate 2", 4, ([48, 48], 0, 0, 3))):
        cfg = T.settings(T.flags().parse_args(flags.split()), real, [], world)
        assert tuple(cfg[k] for k in ("size", "short", "longest", "batch")) == wanted, flags


def test_optimiser_and_schedules_are_the_originals():
    """Decay 0.05 but on norms, embeddings and Swin's bias tables; the backbone at a tenth; the rates of its YAML files."""
    model = m2f.Mask2Former(3, "swin_t", queries=4, encoder_layers=1, decoder_layers=1)
    groups = T.optimiser_of(model, 1e-4).param_groups
    found = {id(p): (g["weight_decay"], g["scale"]) for g in groups for p in g["params"]}
    found = {name: found[id(p)] for name, p in model.named_parameters()}
    still = "decoder.queries decoder.places decoder.level".split()
    for name, (decay, scale) in found.items():
        norm = re.search(r"norm|inputs\.\d\.1|lateral\.1|smooth\.1|features\.0\.2", name) or "bias_table" in name
        assert decay == (0 if norm or name in still else 0.05), name
        assert scale == (0.1 if name.startswith("backbone.") else 1.0), name
    assert found["pixel_decoder.level"] == (0.05, 1.0) and found["decoder.classes.bias"] == (0.05, 1.0)
    assert all(g["lr"] == 1e-4 and g["betas"] == (0.9, 0.999) for g in groups)
    coco, ade = (lambda step, r=T.RECIPES[name]: T.rate(r["schedule"], step, r["steps"], r["warmup"]) for name in ("coco", "ade20k"))
    assert [coco(n) for n in (0, 327_777, 327_778, 355_091, 355_092, 368_749)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [ade(n) for n in (0, 80_000, 159_999)] == pytest.approx([1, 0.5 ** 0.9, (1 / 160_000) ** 0.9])
    assert all(T.RECIPES[name]["clip"] == 0.01 and T.RECIPES[name]["batch"] == 16 for name in ("coco", "ade20k"))


def test_accumulation_equals_one_batch(monkeypatch):
    """Mask and dice gradients, on the same points; the class loss is a mean over what the call sees, so it is left out."""
    torch.manual_seed(0)
    model = m2f.Mask2Former(3, **TOY)
    model.loss.weights["class"] = 0.0
    monkeypatch.setattr(torch, "rand", same_points)
    images, truth = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte(), []
    for i, task in enumerate(("semantic", "panoptic", "instance")):
        _, ids, parts = toy_scene(i)
        truth.append(m2f.targets(ids, parts, [False, True, True], task))
    assert len({len(t["labels"]) for t in truth}) > 1                 # micro-batches of unequally many masks
    losses, grads = [], []
    for batches in ([(images, truth)], [(images[i:i + 1], truth[i:i + 1]) for i in range(3)]):
        model.zero_grad()
        losses.append(T.step_loss(model, model, batches, config(), CPU, 0, 0))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()


def test_reads_grey_rgba_palette_and_jpg(tmp_path):
    root = folder(tmp_path / "p", n=4)
    for i, mode in enumerate(("L", "RGBA", "P")):
        path = root / f"images/{i:03d}.png"
        Image.open(path).convert(mode).save(path)
    known = np.asarray(Image.open(root / "masks/000.png")).copy()
    Image.fromarray(known.astype(np.uint16)).save(root / "masks/000.png")
    assert torch.equal(T.Pairs(root)[0][1][0], torch.from_numpy(known))
    Image.fromarray(known.astype(np.uint16) + 300).save(root / "masks/000.png")
    with pytest.raises(T.BadInput, match="looked for ids of 0 to 255, found 30"):
        T.Pairs(root)[0]
    Image.fromarray(known).save(root / "masks/000.png")
    Image.open(root / "images/003.png").save(root / "images/003.jpg")
    (root / "images/003.png").unlink()
    assert all(T.Pairs(root)[i][0].shape == (3, 32, 32) for i in range(4))


def test_resume_equals_no_stop(tmp_path):
    data = dataset(tmp_path / "d")
    real, synth = T.Pairs(data / "train"), T.Pairs(data / "unseen")
    cfg = config(steps=5, accumulate=2)
    T.RECIPES["tiny"]["save_every"], before = 2, T.RECIPES["tiny"]["save_every"]
    write = T.save_state
    try:
        T.train(T.build(cfg, real.classes, None), T.Batches(real, [synth], cfg), tmp_path / "a", cfg, CPU)

        def stop_at_three(out, model, optimiser, step, cfg):
            write(out, model, optimiser, step, cfg)
            if step == 2:
                raise KeyboardInterrupt
        T.save_state = stop_at_three
        with pytest.raises(KeyboardInterrupt):
            T.train(T.build(cfg, real.classes, None), T.Batches(real, [synth], cfg), tmp_path / "b", cfg, CPU)
        T.save_state = write
        T.train(T.build(cfg, real.classes, None), T.Batches(real, [synth], cfg), tmp_path / "b", cfg, CPU)
    finally:
        T.save_state, T.RECIPES["tiny"]["save_every"] = write, before
    a, b = ((tmp_path / run / "model.safetensors").read_bytes() for run in "ab")
    assert a == b
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 5]
    with pytest.raises(T.BadInput, match="steps 5 then, 6 now"):
        T.resume(tmp_path / "b", T.build(cfg, real.classes, None), None, dict(cfg, steps=6))
    (tmp_path / "b/state.pt").write_bytes((tmp_path / "b/state.pt").read_bytes()[:1000])
    with pytest.raises(T.BadInput, match="delete it"):
        T.resume(tmp_path / "b", T.build(cfg, real.classes, None), None, cfg)


def test_all_void_mask_trains(tmp_path):
    root = folder(tmp_path / "p", n=2)
    for path in (root / "masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    pairs, before = T.Pairs(root), None
    for task in T.SCORE:
        cfg = config(steps=2, task=task)
        model = T.train(T.build(cfg, pairs.classes, None), T.Batches(pairs, [], cfg), tmp_path / task, cfg, CPU)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert T.evaluate(model, pairs, cfg, CPU)["images"] == 2


def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path):
    pairs = T.Pairs(folder(tmp_path / "p"))
    cfg = config(steps=4)
    T.RECIPES["tiny"]["save_every"], before = 1, T.RECIPES["tiny"]["save_every"]
    model = T.build(cfg, pairs.classes, None)
    write = T.save_state

    def spoil(out, model, optimiser, step, cfg):
        write(out, model, optimiser, step, cfg)
        if step == 2:
            with torch.no_grad():
                model.decoder.classes.weight.fill_(float("nan"))
    T.save_state = spoil
    try:
        with pytest.raises(T.BadInput, match="at step 3"):
            T.train(model, T.Batches(pairs, [], cfg), tmp_path / "o", cfg, CPU)
    finally:
        T.save_state, T.RECIPES["tiny"]["save_every"] = write, before
    state = torch.load(tmp_path / "o/state.pt", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(t).all() for t in state["model"].values())


def test_sigkill_and_rerun_gives_the_same_bytes(tmp_path):
    data = dataset(tmp_path / "d")
    flags = ["--data", data, "--steps", 130, "--batch", 1, "--device", "cpu"]
    assert command(*flags, "--out", tmp_path / "a", cwd=tmp_path).returncode == 0
    run = subprocess.Popen([sys.executable, str(REPO / "train.py"), *map(str, flags), "--out", str(tmp_path / "b")],
                           cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    while not (tmp_path / "b/state.pt").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "b/metrics.json").exists()
    again = command(*flags, "--out", tmp_path / "b", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert Image.open(tmp_path / "b/samples.png").width > 300


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_trained_on_eight_it_knows_them(tmp_path, task):
    """The whole loop learns: a few steps on 8 scenes beat the untrained network by far."""
    pairs = T.Pairs(folder(tmp_path / "p", n=8))
    cfg = config(steps=60, batch=4, task=task, lr=1e-3)
    torch.set_num_threads(2)
    model = T.build(cfg, pairs.classes, None)
    before = T.evaluate(model, pairs, cfg, CPU)
    T.train(model, T.Batches(pairs, [], cfg), tmp_path / "o", cfg, CPU)
    after = T.evaluate(model, pairs, cfg, CPU)
    lines = [json.loads(line)["loss"] for line in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    assert lines[-1] < 0.9 * lines[0]
    if task == "semantic":
        assert after["mIoU"] > before["mIoU"] + 20


def test_compare_writes_a_table_goes_on_and_shares_arms(tmp_path):
    data = dataset(tmp_path / "d", n=8)
    folder(tmp_path / "masksyn", seed=7), folder(tmp_path / "imgsyn", seed=8)
    flags = ["--data", data, "--compare", "--synth", tmp_path / "masksyn", tmp_path / "imgsyn", "--limit-real", 4, "--steps", 2,
             "--batch", 2, "--seeds", 0, 1, "--out", tmp_path / "c"]
    first = command(*flags, "--protocol", "same 100", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    table = json.loads((tmp_path / "c/same 100.json").read_text())
    assert list(table["arms"]) == ["real only", "+ MaskSyn", "+ ImgSyn", "+ both", "oracle"]
    gain = table["arms"]["+ both"]["val"]["gain"]["1"]
    runs = table["runs"]
    assert np.isclose(gain, runs["+ both"]["1"]["val"]["mIoU"] - runs["real only"]["1"]["val"]["mIoU"])
    assert "| oracle |" in (tmp_path / "c/same 100.md").read_text() and (tmp_path / "c/same 100.png").exists()
    assert len(list((tmp_path / "c/runs").iterdir())) == 10
    folder(tmp_path / "imgsyn", seed=9, n=5)                          # other pairs: only their arms are trained anew
    assert command(*flags, "--protocol", "other", cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "c/runs").iterdir())) == 14


def test_eval_only_on_another_folder(tmp_path):
    data = dataset(tmp_path / "d")
    assert command("--data", data, "--steps", 1, "--batch", 1, "--out", tmp_path / "o", cwd=tmp_path).returncode == 0
    done = command("--data", data, "--eval-only", "--out", tmp_path / "o", "--eval-pairs", data / "val", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mIoU is 1.000 of val's" in done.stdout
    flags = ["--data", data, "--eval-only", "--out", tmp_path / "o", "--splits", "val", "--predictions", tmp_path / "p"]
    assert command(*flags, cwd=tmp_path).returncode == 0
    before = bytes_of(tmp_path / "p")
    for more, words in (((), "p/val: is there already"), (("--eval-pairs", data / "val"), "sets of different names")):
        done = command(*flags, *more, cwd=tmp_path)
        assert done.returncode != 0 and words in done.stderr and bytes_of(tmp_path / "p") == before, done.stderr


# --------------------------------------------------------------------------------------------------- bad input

def spoil(kind, root):
    train = root / "train"
    small, masks = np.zeros((8, 8), np.uint8), train / "masks/001.png"
    if kind == "no mask":
        masks.unlink()
    elif kind == "no image":
        (train / "images/001.png").unlink()
    elif kind == "size":
        Image.fromarray(small).save(masks)
    elif kind == "truncated":
        path = train / "images/001.png"
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "no picture":
        (train / "images/001.png").write_text("not a picture")
    elif kind == "ids":
        Image.fromarray(np.full((32, 32), 5, np.uint8)).save(masks)
    elif kind == "rgb":
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(masks)
    elif kind == "empty":
        for path in (*(train / "images").iterdir(), *(train / "masks").iterdir()):
            path.unlink()
    elif kind == "classes":
        (train / "classes.json").write_text(json.dumps([dict(name=str(i), isthing=False) for i in range(215)]))
    elif kind == "json":
        (train / "classes.json").write_text('{"sky": 1}')
    elif kind == "no classes":
        (train / "classes.json").unlink()
    elif kind == "instances":
        (train / "instances/001.png").unlink()


@pytest.mark.parametrize("kind,words", [
    ("no mask", "masks"), ("no image", "images"), ("size", "same size"), ("truncated", "001.png"), ("ids", "class id 5"),
    ("no picture", "readable"), ("rgb", "RGB"), ("empty", "looked for pairs"), ("classes", "215 classes"),
    ("json", "classes.json"), ("no classes", "classes.json"), ("instances", "instances")])
def test_bad_data_is_told_in_one_line(tmp_path, kind, words):
    root = dataset(tmp_path)
    spoil(kind, root)
    with pytest.raises(T.BadInput, match=words) as caught:
        T.go(T.flags().parse_args(["--data", str(root), "--steps", "1", "--out", str(tmp_path / "o")]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_bad_commands_end_in_one_line(tmp_path):
    data = dataset(tmp_path / "d")
    other = dataset(tmp_path / "other", classes=CLASSES[:3] + [dict(CLASSES[3], name="cup")])
    (tmp_path / "fake.safetensors").write_bytes(b"\x80\x04nothing")
    cases = [(["--data", tmp_path / "gone"], "looked for a data set"), (["--data", data, "--steps", "-3"], "over zero"),
             (["--data", data, "--synth", other / "train"], "first difference at id 4"),
             (["--data", data, "--device", "cuda"], "CUDA"), (["--data", data, "--p-synth", "1.5"], "from 0 to 1"),
             (["--data", data, "--init", tmp_path / "fake.safetensors"], "fake"),
             (["--data", data, "--eval-only", "--out", tmp_path / "none"], "train one first"),
             (["--data", data, "--compare", "--arms", "masksyn"], "the arms are"),
             (["--data", data, "--pretrain"], "--pretrain: looked for synthetic pairs")]
    if torch.cuda.is_available():
        cases = [c for c in cases if "cuda" not in c[0]]
    for flags, words in cases:
        done = command(*flags, cwd=tmp_path)
        assert done.returncode != 0 and words in done.stderr, (flags, done.stderr)
        assert "Traceback" not in done.stderr, flags


@pytest.mark.parametrize("given, words", [
    ("--arms real", "--arms: looked for --compare"), ("--protocol x", "--protocol: looked for --compare"),
    ("--compare --seed 1", "--seed: says nothing beside --compare"),
    ("--pretrain --p-synth 0.5", "--p-synth: says nothing beside --pretrain"),
    ("--eval-only --init x --new-head", "--new-head: says nothing beside --eval-only"),
    ("--new-head", "--new-head: looked for --init"), ("--init x --preset swin_t", "--preset: says nothing beside --init"),
    ("--eval-only --steps 7", "--steps: says nothing beside --eval-only"),
    ("--predictions x", "--predictions: looked for --eval-only"),
    ("--compare --protocol ../x", "looked for a name, found a path")])
def test_flags_that_would_do_nothing_are_told(given, words):
    with pytest.raises(T.BadInput, match=words):
        T.check_flags(T.flags().parse_args(given.split()))


def test_numbers_under_zero_end_in_one_line(capsys):
    for flags in (["--seed", "-1"], ["--workers", "-1"], ["--seeds", "0", "-1"]):
        with pytest.raises(SystemExit):
            T.flags().parse_args(flags)
        assert "0 or more" in capsys.readouterr().err


def test_each_rank_takes_its_gpu_before_it_joins(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: calls.append(backend))
    for name, value in dict(RANK="7", LOCAL_RANK="3", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    assert T.start("auto") == (torch.device("cuda:3"), 7, 8) and calls == ["cuda:3", "nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="looked for a GPU for rank 3 of this machine, found 2"):
        T.start("auto")


def test_what_is_missing_is_made_outside_the_process_group(tmp_path, monkeypatch):
    (tmp_path / "make.py").write_text("import os\nos.mkdir('made')\nopen('made/seen', 'w').write(' '.join(os.environ))")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "HERE", tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PASSED_ON"):
        monkeypatch.setenv(name, "1")
    T.made(tmp_path / "made", "make.py")
    seen = (tmp_path / "made/seen").read_text().split()
    assert "PASSED_ON" in seen and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(seen)
    assert not list(tmp_path.glob(".*unfinished"))
    (tmp_path / "make.py").write_text("import sys\nopen('made/images/' + sys.argv[1], 'w')")
    (tmp_path / "made/images").mkdir()
    for name, pairs in (("a.png", 0), ("b.png", 1), ("c.png", 1), ("d.png", 2)):                # a and c are not needed
        T.made(tmp_path / "made", "make.py", name, pairs=pairs)
    assert sorted(p.name for p in tmp_path.glob("made/images/*")) == ["b.png", "d.png"]


def test_an_oracle_without_gain_has_no_share():
    scores = {arm: {0: {"val": {"mIoU": value}}} for arm, value in (("real only", 50.0), ("+ MaskSyn", 51.0), ("oracle", 50.0))}
    assert T.summary(scores, "+ MaskSyn", "val", "mIoU")["share"] is None
    scores["oracle"][0]["val"]["mIoU"] = 54.0
    assert T.summary(scores, "+ MaskSyn", "val", "mIoU")["share"] == 0.25


def test_a_segmenter_of_things_alone_fits_a_folder_with_stuff(tmp_path):
    things = [c for c in CLASSES if c["isthing"]]
    T.save(T.build(config(task="instance"), things, None), str(tmp_path / "model.safetensors"))
    old = m2f.load(tmp_path)
    new, image = T.build(config(task="instance"), CLASSES, tmp_path).eval(), torch.rand(1, 3, 32, 32)
    assert new.config["num_classes"] == 4
    with torch.no_grad():
        had, has = (model(image)[-1]["class_logits"].softmax(-1) for model in (old, new))
    assert torch.allclose(had, has[..., 2:], atol=1e-6) and has[..., :2].max() == 0
    with pytest.raises(T.BadInput, match="2 classes, the data has 4"):
        T.build(config(task="panoptic"), CLASSES, tmp_path)


def test_another_data_sets_checkpoint_is_refused(tmp_path):
    cfg = config()
    T.save(T.build(cfg, CLASSES, None), str(tmp_path / "model.safetensors"))
    other = CLASSES[:3]
    with pytest.raises(T.BadInput, match="trained for 4 classes, .* has 3; .* id 4, box there and none here; --new-head"):
        T.build(cfg, other, tmp_path / "model.safetensors")
    model = T.build(cfg, other, tmp_path / "model.safetensors", new_head=True)
    assert model.config["class_names"] == ["sky", "grass", "ball"] and model.decoder.classes.out_features == 4
    other = [dict(c, name=n) for c, n in zip(CLASSES, ("Sky", "grass, lawn", "ball", "b-o_x"))]
    with pytest.raises(T.BadInput, match="id 4, box there and b o x here"):
        T.build(cfg, other, tmp_path / "model.safetensors")
    other[3]["name"] = "box"                                          # another release's spelling is the same class
    model = T.build(cfg, other, tmp_path / "model.safetensors")
    assert model.config["class_names"] == ["Sky", "grass, lawn", "ball", "box"]


# ======================================== mask2former.py

TOY = dict(m2f.PRESETS["tiny"], queries=12, points=256)


def toy_scene(seed, size=64):
    """An image of coloured rectangles and its class ids (3 classes, 0 void) and instances."""
    rng = np.random.default_rng(seed)
    ids, parts = np.ones((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for part in (1, 2, 3):
        y, x = rng.integers(0, size - 20, 2)
        k = int(rng.integers(2, 4))
        ids[y:y + 18, x:x + 18], parts[y:y + 18, x:x + 18] = k, part
    ids[:3] = 0
    colour = np.array([[0, 0, 0], [90, 160, 240], [220, 60, 40], [40, 180, 60]]) / 255
    image = colour[ids] + rng.normal(0, 0.03, (size, size, 3))
    return torch.from_numpy(image).permute(2, 0, 1).float().clamp(0, 1), ids, parts


# ---- assignment -----------------------------------------------------------------------------------------------------

def test_hungarian_equals_brute_force():
    """Problems of several heights side by side, ties among them."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        n = int(rng.integers(1, 6))
        m, rows = int(rng.integers(n, 7)), rng.integers(0, n + 1, 10)
        cost = rng.normal(size=(10, n, m)) if rng.random() < 0.5 else rng.integers(0, 4, (10, n, m)).astype(float)
        for one, k, cols in zip(cost, rows, m2f.hungarian(cost, rows)):
            assert len(set(cols[:k].tolist())) == k and (cols[:k] >= 0).all() and (cols[k:] == -1).all()
            best = min(sum(one[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(m), int(k)))
            assert abs(one[np.arange(k), cols[:k]].sum() - best) < 1e-9


def test_hungarian_equals_scipy():
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    for i in range(300):
        n = int(rng.integers(0, 40))
        m = int(rng.integers(n, 60))
        cost = rng.normal(size=(10, n, m)) * 10 if i % 3 else rng.integers(0, 6, (10, n, m)).astype(float)
        if i % 7 == 0 and n:
            cost = cost[:, :1] + rng.normal(size=(10, n, m)) * 1e-3                         # everyone wants the same column
        for one, cols in zip(cost, m2f.hungarian(cost)):
            a, b = scipy.linear_sum_assignment(one)
            assert len(set(cols.tolist())) == n and abs(one[np.arange(n), cols].sum() - one[a, b].sum()) < 1e-7


def test_hungarian_refuses_nan():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            m2f.hungarian(np.array([[[1.0, bad]]]))
    with pytest.raises(ValueError, match="3 rows for 2 columns"):
        m2f.hungarian(np.zeros((1, 3, 2)))


# ---- layers ---------------------------------------------------------------------------------------------------------

def test_deformable_attention_equals_slow_loop():
    torch.manual_seed(0)
    D, heads, sizes = 8, 2, [(2, 3), (4, 5), (7, 9)]
    layer = m2f.DeformableAttention(D, heads)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    N = sum(h * w for h, w in sizes)
    x, code, places = torch.randn(1, N, D), torch.randn(1, N, D), torch.rand(N, 2)
    fast = layer(x, code, places, sizes)[0]
    q, value = (x + code)[0], layer.value(x)[0].view(N, heads, D // heads)
    offsets = layer.offsets(q).view(N, heads, 3, 4, 2)
    weights = layer.weights(q).view(N, heads, 12).softmax(-1).view(N, heads, 3, 4)
    slow = torch.zeros(N, heads, D // heads)
    for n, head, level, p in itertools.product(range(N), range(heads), range(3), range(4)):
        h, w = sizes[level]
        start = sum(a * b for a, b in sizes[:level])
        px = float(places[n, 0] * w - 0.5 + offsets[n, head, level, p, 0])
        py = float(places[n, 1] * h - 0.5 + offsets[n, head, level, p, 1])
        for iy, ix in itertools.product((math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)):
            if 0 <= iy < h and 0 <= ix < w:
                part = (1 - abs(py - iy)) * (1 - abs(px - ix))
                slow[n, head] += weights[n, head, level, p] * part * value[start + iy * w + ix, head]
    assert torch.allclose(fast, layer.out(slow.flatten(1)), atol=1e-4)


def test_big_maps_are_read_again_in_the_backward_pass(monkeypatch):
    torch.manual_seed(0)
    layer, sizes, calls, grads = m2f.DeformableAttention(32, 1), [(10, 10), (40, 40), (180, 180)], [], []
    x, places = torch.randn(1, sum(h * w for h, w in sizes), 32), torch.rand(sum(h * w for h, w in sizes), 2)
    again = m2f.checkpoint
    for function in (lambda *a, **k: calls.append(1) or again(*a, **k), lambda read, *a, **k: read(*a)):
        monkeypatch.setattr(m2f, "checkpoint", function)
        layer(x, x.flip(1), places, sizes).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
        layer.zero_grad()
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(*grads))


def test_strips_equal_interpolate():
    masks = torch.randn(3, 17, 13)
    for size in ((68, 52), (40, 31), (1, 7), (300, 5)):
        want = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
        got = torch.cat([band for _, band in m2f.strips(masks, size)], 1)
        assert torch.allclose(got, want, atol=1e-5)
    want = F.interpolate(masks[None], (68, 52), mode="bilinear", align_corners=False)[0][:, :61, :50]
    got = torch.cat([band for _, band in m2f.strips(masks, (61, 50), (61 / 68, 50 / 52))], 1)
    assert torch.allclose(got, want, atol=1e-5)


def test_batched_equals_single():
    torch.manual_seed(0)
    model, x = m2f.Mask2Former(3, **TOY).eval(), torch.rand(3, 3, 48, 64)
    both, single = model(x), model(x[1:2])
    assert len(both) == TOY["decoder_layers"] + 1
    for a, b in zip(both, single):
        assert torch.allclose(a["class_logits"][1:2], b["class_logits"], atol=1e-4)
        assert torch.allclose(a["mask_logits"][1:2], b["mask_logits"], atol=1e-3)
    assert both[-1]["mask_logits"].shape == (3, 12, 24, 32) and both[-1]["class_logits"].shape == (3, 12, 4)


# ---- targets and loss -----------------------------------------------------------------------------------------------

def test_targets_of_the_three_tasks():
    ids = np.array([[0, 1, 1, 2], [2, 2, 2, 3]])
    parts = np.array([[9, 5, 6, 1], [2, 2, 255, 1]])
    isthing = [False, True, True]
    t = m2f.targets(ids, parts, isthing, "semantic")
    assert t["labels"].tolist() == [0, 1, 2] and t["masks"].sum((1, 2)).tolist() == [2, 4, 1]
    t = m2f.targets(ids, parts, isthing, "panoptic")
    assert t["labels"].tolist() == [0, 1, 1, 2] and t["masks"].sum((1, 2)).tolist() == [2, 1, 2, 1]
    t = m2f.targets(ids, parts, isthing, "instance")
    assert t["labels"].tolist() == [1, 1, 2] and t["masks"].dtype == torch.bool
    empty = m2f.targets(np.zeros((4, 4)), None, isthing, "panoptic")
    assert empty["labels"].shape == (0,) and empty["masks"].shape == (0, 4, 4)
    with pytest.raises(ValueError, match="class id 9"):
        m2f.targets(np.full((2, 2), 9), None, isthing, "panoptic")


def test_overfits_two_images():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scenes = [toy_scene(i) for i in range(2)]
    x = torch.stack([s[0] for s in scenes])
    isthing = [False, True, True]
    truth = [m2f.targets(ids, parts, isthing, "panoptic") for _, ids, parts in scenes]
    model = m2f.Mask2Former(3, isthing=isthing, **TOY)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    first = None
    for _ in range(120):
        loss, parts = model.loss(model(x), truth)
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert loss.item() < first / 5 and abs(sum(parts.values()) - loss) < 1e-3
    seen = right = 0
    for image, ids, parts in scenes:
        guess = m2f.predict(model, image, "semantic").numpy() + 1
        seen, right = seen + (ids > 0).sum(), right + ((guess == ids) & (ids > 0)).sum()
    assert right / seen > 0.9


def test_targets_without_masks_and_with_too_many():
    torch.manual_seed(0)
    model, x = m2f.Mask2Former(3, **dict(TOY, queries=4)), torch.rand(2, 3, 32, 32)
    none = {"labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 32, 32, dtype=torch.bool)}
    empty = {"labels": torch.tensor([0, 2]), "masks": torch.zeros(2, 32, 32, dtype=torch.bool)}
    many = {"labels": torch.randint(0, 3, (9,)), "masks": torch.rand(9, 32, 32) > 0.7}
    dot = {"labels": torch.tensor([1]), "masks": torch.zeros(1, 32, 32)}                # a ghost: no pixel of its own
    for truth in ([none, none], [none, many], [many, dot], [dot, none], [empty, dot]):
        loss, parts = model.loss(model(x), truth)
        model.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    loss, parts = model.loss(model(x), [none, none])
    assert parts["mask"] == 0 and parts["dice"] == 0 and parts["class"] > 0


def test_of_too_many_targets_the_costliest_are_left_out(monkeypatch):
    """4 queries, 9 targets: the assignment is the cheapest of all, and the loss that of its 4 targets alone."""
    torch.manual_seed(0)
    model, out = m2f.Mask2Former(3, **dict(TOY, queries=4)), []
    truth = {"labels": torch.randint(0, 3, (9,)), "masks": torch.rand(9, 32, 32) > 0.7}
    monkeypatch.setattr(torch, "rand", same_points)
    outputs = model(torch.zeros(1, 3, 32, 32).normal_())[-1:]
    costs, match = model.loss.costs, model.loss.match
    monkeypatch.setattr(model.loss, "costs", lambda *a: out.append(costs(*a)) or out[-1])
    monkeypatch.setattr(model.loss, "match", lambda *a: out.append(match(*a)) or out[-1])
    _, both = model.loss(outputs, [truth], num_masks=9)
    cost, query = out[0][0].detach().numpy(), out[1][0].numpy()                         # (Q, N), (N,)
    kept = np.flatnonzero(query >= 0)
    assert sorted(query[kept]) == [0, 1, 2, 3]
    best = min(cost[range(4), list(p)].sum() for p in itertools.permutations(range(9), 4))
    assert cost[query[kept], kept].sum() == pytest.approx(best, rel=1e-5)
    _, alone = model.loss(outputs, [{k: v[kept] for k, v in truth.items()}], num_masks=9)
    assert all(both[k] > 0 and torch.allclose(both[k], alone[k]) for k in both)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_an_image_with_few_targets_keeps_them_beside_one_with_too_many(scale):
    torch.manual_seed(0)
    model = m2f.Mask2Former(3, **dict(TOY, queries=2))
    L, embed = 4, scale * torch.randn(4, 2, 2, 64)
    masks = [torch.rand(n, 16, 16) > 0.5 for n in (3, 1)]
    query = model.loss.match(torch.randn(L, 2, 2, 4), embed, torch.randn(2, 64, 16, 16),
                             [torch.zeros(n, dtype=torch.long) for n in (3, 1)], [m.float() for m in masks], [None] * 2)
    assert query.shape == (L, 4) and (query[:, 3] >= 0).all()
    assert all(sorted(row.tolist()) == [-1, 0, 1] for row in query[:, :3])


def test_valid_leaves_void_out_of_the_mask_losses():
    torch.manual_seed(0)
    model, x = m2f.Mask2Former(2, **TOY), torch.rand(1, 3, 32, 32)
    outputs, mask = model(x), torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, :16, :16] = True
    valid = torch.zeros(32, 32, dtype=torch.bool)
    valid[:16] = True
    flipped = mask.clone()
    flipped[:, 20:] = True                                                              # differs only where invalid
    losses = []
    for m in (mask, flipped):
        torch.manual_seed(1)
        losses.append(model.loss(outputs, [{"labels": torch.tensor([0]), "masks": m, "valid": valid}])[1])
    assert torch.allclose(losses[0]["mask"], losses[1]["mask"]) and torch.allclose(losses[0]["dice"], losses[1]["dice"])


def test_valid_of_some_images_counts_for_those():
    """The first image has no segment; without `valid` it counts as valid everywhere."""
    torch.manual_seed(0)
    model, x = m2f.Mask2Former(2, **TOY), torch.rand(2, 3, 32, 32)
    none = {"labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 32, 32, dtype=torch.bool)}
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, :16] = True
    valid = {"valid": torch.ones(32, 32, dtype=torch.bool)}
    one, losses, outputs = {"labels": torch.tensor([0]), "masks": mask} | valid, [], model(x)
    for more in ({}, valid):
        torch.manual_seed(1)
        losses.append(model.loss(outputs, [none | more, one])[0])
    assert torch.equal(*losses)


def test_frozen_norms_keep_the_precision_they_are_given():
    norms = [m for m in m2f.ResNet("resnet50").modules() if isinstance(m, m2f.FrozenBatchNorm2d)]
    assert len(norms) == 53 and all(n(torch.ones(1, n.weight.numel(), 2, 2).bfloat16()).dtype == torch.bfloat16 for n in norms)


def test_nan_outputs_are_told():
    model, x = m2f.Mask2Former(3, **TOY), torch.rand(1, 3, 32, 32)
    outputs = model(x)
    outputs[0]["class_logits"] = outputs[0]["class_logits"] * float("nan")
    with pytest.raises(ValueError, match="finite"):
        model.loss(outputs, [m2f.targets(np.ones((32, 32)))])


# ---- inference ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 1), (47, 61)])
def test_any_image_size(size):
    torch.manual_seed(0)
    model = m2f.Mask2Former(3, isthing=[False, True, True], **TOY)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    assert m2f.predict(model, image, "semantic").shape == size
    assert m2f.predict(model, image, "panoptic")[0].shape == size
    assert all(s["mask"].shape == size for s in m2f.predict(model, image, "instance"))
    assert m2f.predict(model, image, "semantic", window=24, scales=(0.5, 1.0), flip=True).shape == size
    assert m2f.predict(model, image, "semantic", short=40).shape == size


def test_a_thin_image_does_not_grow_without_end():
    assert m2f.resized(torch.zeros(3, 1, 2000), 800).shape == (3, 2, 3200)
    assert m2f.resized(torch.zeros(3, 2000, 1), 800, 0.5).shape == (3, 1600, 1)
    assert m2f.resized(torch.zeros(3, 100, 400), 50, 1.5).shape == (3, 75, 300)


def test_flip_and_window_agree_with_plain():
    torch.manual_seed(0)
    model = m2f.Mask2Former(3, **TOY).eval()
    image = torch.rand(3, 48, 48)
    plain = m2f.predict(model, image, "semantic")
    assert torch.equal(plain, m2f.predict(model, image, "semantic", window=48))          # one window = the whole
    both = m2f.predict(model, image, "semantic", flip=True)
    assert torch.equal(both.flip(1), m2f.predict(model, image.flip(2), "semantic", flip=True))


def slow_scores(model, image):
    """(K, H, W) class scores of one image (3, H, W) whose sides are multiples of 16, query by query."""
    with torch.no_grad():
        pred = model(image[None])[-1]
    total = 0
    for logits, mask in zip(pred["class_logits"][0], pred["mask_logits"][0]):
        mask = F.interpolate(mask[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0]
        total = total + logits.softmax(0)[:-1, None, None] * mask.sigmoid()
    return total


@pytest.mark.parametrize("window", [None, 32])
def test_windows_scales_and_flips_equal_a_slow_loop(window):
    torch.manual_seed(0)
    model, (H, W) = m2f.Mask2Former(3, **TOY).eval(), (64, 96)
    torch.nn.init.normal_(model.decoder.classes.weight, std=0.3)
    with torch.no_grad():
        model.decoder.masks[4].weight.mul_(30)                                          # classes that differ by place
    image, total = F.interpolate(torch.rand(1, 3, 4, 6), (H, W), mode="bicubic")[0].clamp(0, 1), 0
    starts = {32: [0], 48: [0, 16], 64: [0, 21, 32], 96: [0, 21, 42, 63, 64]}
    for scale in (0.5, 1.0):
        h, w = int(H * scale), int(W * scale)
        copy = F.interpolate(image[None], (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1) if scale < 1 else image
        for mirror in (False, True):
            seen = copy.flip(2) if mirror else copy
            if window:
                score, times = torch.zeros(3, h, w), torch.zeros(h, w)
                for top, left in itertools.product(starts[h], starts[w]):
                    score[:, top:top + 32, left:left + 32] += slow_scores(model, seen[:, top:top + 32, left:left + 32])
                    times[top:top + 32, left:left + 32] += 1
                score = F.interpolate((score / times)[None], (H, W), mode="bilinear", align_corners=False)[0]
            else:
                with torch.no_grad():
                    pred = model(seen[None])[-1]
                masks = F.interpolate(pred["mask_logits"], (H, W), mode="bilinear", align_corners=False)[0].sigmoid()
                score = sum(k[:-1, None, None] * m for k, m in zip(pred["class_logits"][0].softmax(1), masks))
            total = total + (score.flip(2) if mirror else score)
    best = total.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4 * best[0]                                          # not a tie
    ours = m2f.predict(model, image, "semantic", window=window, scales=(0.5, 1.0), flip=True)
    assert clear.float().mean() > 0.95 and len(ours.unique()) > 1 and torch.equal(ours[clear], total.argmax(0)[clear])
    with pytest.raises(ValueError, match="for semantic, not for panoptic"):
        m2f.predict(model, image, "panoptic", window=window, flip=True)


PEAK = """
import resource, torch, mask2former as m2f
torch.manual_seed(0)
model = m2f.Mask2Former(20, **dict(m2f.PRESETS["tiny"], queries=200, encoder_layers=1, decoder_layers=1),
                        isthing=[True] * 20)
image = torch.rand(3, 2048, 2048)
with torch.no_grad():
    model.decoder.classes.weight.mul_(30)
result = m2f.predict(model, image, "{task}", **{limits})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
"""


@pytest.mark.parametrize("task, limits", [("semantic", {}), ("panoptic", {"object_threshold": 0.05}), ("instance", {})])
@pytest.mark.skipif("SEGGEN_SLOW" not in os.environ, reason="SEGGEN_SLOW is not set: half a minute of a core each")
def test_a_huge_image_takes_under_3_gb(task, limits):
    """2048 x 2048 with 200 queries, whose masks are 1024 x 1024 in `tiny`: four times those of the big backbones."""
    code = PEAK.replace("{task}", task).replace("{limits}", repr(limits))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 3, done.stdout


def confident(Q=20, K=6, size=96, seed=0):
    """Saturated logits of overlapping boxes, as a trained network's are; classes 0-2 stuff, 3-5 things."""
    g = torch.Generator().manual_seed(seed)
    masks, logits = torch.full((Q, size, size), -12.0), torch.zeros(Q, K + 1)
    for q in range(Q):
        y, x, h, w = torch.randint(0, size - 40, (2,), generator=g).tolist() + torch.randint(12, 40, (2,), generator=g).tolist()
        masks[q, y:y + h, x:x + w] = 12 + q * 0.1
        logits[q, int(torch.randint(0, K + 1, (1,), generator=g))] = 5 + 5 * float(torch.rand(1, generator=g))
    return {"class_logits": logits, "mask_logits": masks}


def test_postprocessing_equals_transformers():
    pytest.importorskip("transformers")
    from transformers import Mask2FormerImageProcessor
    processor, size, isthing = Mask2FormerImageProcessor(), (384, 384), [False] * 3 + [True] * 3
    for seed in range(4):
        pred = confident(seed=seed)
        theirs_in = SimpleNamespace(class_queries_logits=pred["class_logits"][None], masks_queries_logits=pred["mask_logits"][None])
        ours = m2f.semantic(pred, size)
        theirs = processor.post_process_semantic_segmentation(theirs_in)[0]
        assert torch.equal(ours, theirs)
        segment_map, segments = m2f.panoptic(pred, size, isthing)
        them = processor.post_process_panoptic_segmentation(theirs_in, threshold=0.8, label_ids_to_fuse={0, 1, 2})[0]
        scores, labels = pred["class_logits"].softmax(-1).max(-1)
        kept = (labels < 6) & (scores > 0.8)
        probs = F.interpolate(pred["mask_logits"][kept][None], size, mode="bilinear")[0].sigmoid()
        sure = probs.gather(0, (probs * scores[kept][:, None, None]).argmax(0)[None])[0] >= 0.5
        theirs = them["segmentation"].long() * sure       # they also give away pixels whose winner's own mask says no
        assert segments and torch.equal(segment_map > 0, theirs > 0)
        same = (segment_map * 1000 + theirs).unique()                 # one segment of ours, one of theirs
        same = {(int(s) // 1000, int(s) % 1000) for s in same if s}
        kinds = {t["id"]: t["label_id"] for t in them["segments_info"]}
        assert len(same) == len(segments) == len({a for a, _ in same}) == len({b for _, b in same})
        assert {s["id"]: s["class"] for s in segments} == {a: kinds[b] for a, b in same}
        ours = m2f.instance(pred, size, top=20)
        them = processor.post_process_instance_segmentation(theirs_in, threshold=0.0, return_binary_maps=True)[0]
        bits = lambda m: np.asarray(m).astype(bool).tobytes()  # noqa: E731
        theirs = sorted((round(s["score"], 4), s["label_id"], bits(m)) for s, m in zip(them["segments_info"], them["segmentation"]))
        assert sorted((round(s["score"], 4), s["class"], bits(s["mask"])) for s in ours) == theirs


# ---- weights --------------------------------------------------------------------------------------------------------

def test_save_and_load(tmp_path):
    model = m2f.Mask2Former(3, isthing=[False, True, True], class_names=["a", "b", "c"], task="instance", **TOY)
    m2f.save(model, tmp_path / "a" / "model.safetensors")
    again = m2f.load(tmp_path / "a")
    assert again.config == json.loads(json.dumps(model.config)) and not again.training
    for (k, a), (j, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert k == j and torch.equal(a, b)
    half = m2f.Mask2Former(3, **TOY).half()
    m2f.save(half, tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in m2f.load(tmp_path / "half.safetensors").parameters())
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".part")]


def test_bad_weights_end_in_one_line(tmp_path):
    model = m2f.Mask2Former(3, **TOY)
    whole = tmp_path / "model.safetensors"
    m2f.save(model, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:5000])
    torch.save({"x": torch.zeros(1)}, tmp_path / "p.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "p.bin")
    from safetensors.torch import load_file, save_file
    tensors = load_file(whole)

    def about(**changes):
        return {"seggen": json.dumps({"format": "seggen-1", "class": "Mask2Former", "config": model.config, **changes})}
    save_file({k: v for k, v in tensors.items() if k != "decoder.level"}, tmp_path / "missing.safetensors", about())
    save_file(dict(tensors, more=torch.zeros(1)), tmp_path / "extra.safetensors", about())
    save_file(tensors, tmp_path / "shape.safetensors", about(config=dict(model.config, num_classes=4)))
    save_file(tensors, tmp_path / "other.safetensors", about(**{"class": "UNet"}))
    save_file(tensors, tmp_path / "newer.safetensors", about(format="seggen-9"))
    save_file(tensors, tmp_path / "argument.safetensors", about(config=dict(model.config, colour="red")))
    save_file(tensors, tmp_path / "garbled.safetensors", {"seggen": "{"})
    for key, value in dict(class_names=["a", "b"], isthing=[1, 0, 1], task="dance", points=0, heads=0).items():
        save_file(tensors, tmp_path / f"{key}.safetensors", about(config={**model.config, key: value}))
    ours = {"model_type": "mask2former"}
    for name, about_it in (("bare", None), ("family", {"model_type": "maskformer"}), ("bodiless", ours), ("listed", []),
                           ("headless", dict(ours, backbone_config={})), ("cut", "{"),
                           ("odd", dict(ours, backbone_config={"depths": 3}))):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        if about_it is not None:
            (tmp_path / name / "config.json").write_text(about_it if about_it == "{" else json.dumps(about_it))
    for name, words in {"nothing": "no such", "cut.safetensors": "not a whole", "p.safetensors": "pickle", "p.bin": "pickle",
                        "missing.safetensors": "decoder.level", "extra.safetensors": "more", "shape.safetensors": "classes",
                        "other.safetensors": "UNet", "bare": "config.json", "family": "'maskformer', not 'mask2former'",
                        "headless": "class_predictor", "newer.safetensors": "found seggen-9", "cut": "config.json: looked for",
                        "argument.safetensors": "colour", "garbled.safetensors": "that make none", "odd": "that make none",
                        "class_names.safetensors": "class_names", "isthing.safetensors": "isthing",
                        "task.safetensors": "dance", "points.safetensors": "points", "heads.safetensors": "size under 1",
                        "bodiless": "looked for backbone_config", "listed": "config.json: looked for"}.items():
        with pytest.raises(SystemExit, match=words) as error:
            m2f.load(tmp_path / name)
        assert "\n" not in str(error.value)


def public_model(name="swin_t", K=7, queries=100):
    transformers = pytest.importorskip("transformers")
    width, depths, heads, window = m2f.SWINS[name]
    swin = transformers.SwinConfig(embed_dim=width, depths=list(depths), num_heads=list(heads), window_size=window,
                                   drop_path_rate=0.3, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_labels=K, num_queries=queries,
                                          train_num_points=1024)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model with random weights of a livelier scale, and ours that read its folder."""
    torch.manual_seed(0)
    theirs = public_model()
    with torch.no_grad():
        for k, p in theirs.named_parameters():
            if "relative_position_bias_table" in k or "sampling_offsets.weight" in k or "attention_weights" in k:
                p.normal_(std=0.05)
            elif "layernorm" in k or "norm" in k:
                p.add_(torch.randn_like(p) * 0.1)
            elif "encoder.layers" in k and p.dim() == 2 or k.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.02)
    folder = tmp_path_factory.mktemp("mask2former-swin-tiny-coco-instance")
    theirs.save_pretrained(folder)
    return theirs, m2f.load(folder), folder


def both_run(pair, size, seed=0):
    theirs, ours, _ = pair
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, *size, generator=g)
    with torch.no_grad():
        a = theirs((x - ours.mean) / ours.std, output_auxiliary_logits=True)
        b = ours(x)
    a = [*a.auxiliary_logits, {"class_queries_logits": a.class_queries_logits, "masks_queries_logits": a.masks_queries_logits}]
    return a, b


@pytest.mark.parametrize("size", [(128, 160), (101, 74), (5, 90)])
def test_outputs_equal_transformers(pair, size):
    theirs, ours = both_run(pair, size)                               # fp32
    assert len(theirs) == len(ours) == 10
    for a, b in zip(theirs, ours):
        for x, y in ((a["class_queries_logits"], b["class_logits"]), (a["masks_queries_logits"], b["mask_logits"])):
            assert x.shape == y.shape and (x - y).abs().max() < 1e-4 * x.abs().max()


def same_points(*size, **kw):
    """Stands in for torch.rand: the same points for every mask, whoever asks, in any order."""
    if len(size) < 2:                                                      # a draw of another kind
        return torch.zeros(*size, **kw)
    g = torch.Generator().manual_seed(size[-2])
    return torch.empty(1, *size[-2:]).uniform_(generator=g).repeat(*size[:-2], 1, 1)


@pytest.fixture
def exact(pair):
    """The pair in double precision: no ReLU, argmin or mask at its threshold falls to the other side by rounding."""
    theirs, ours, _ = pair
    torch.set_default_dtype(torch.float64)
    yield theirs.double(), ours.double()
    torch.set_default_dtype(torch.float32)
    theirs.float(), ours.float()


def test_loss_and_gradients_equal_transformers(exact, monkeypatch):
    theirs, ours = exact
    scenes = [toy_scene(i) for i in (3, 4)]
    x = torch.stack([s[0] for s in scenes]).double()
    truth = [m2f.targets(ids, parts, [False, True, True], "panoptic") for _, ids, parts in scenes]
    monkeypatch.setattr(torch, "rand", same_points)
    a = theirs((x - ours.mean) / ours.std, mask_labels=[t["masks"].double() for t in truth],
               class_labels=[t["labels"] for t in truth]).loss
    b, _ = ours.loss(ours(x), truth)
    assert b.dtype == torch.float64 and abs(a - b) < 1e-6 * abs(a)
    for model, loss in ((theirs, a), (ours, b)):
        model.zero_grad()
        loss.backward()
    want = m2f.renamed({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None})
    got = {k: p.grad for k, p in ours.named_parameters()}
    assert set(want) == set(got)
    top = max(g.norm() for g in want.values())
    worst = {k: ((want[k] - got[k]).norm() / (want[k].norm() + 1e-6 * top)).item() for k in want}
    assert max(worst.values()) < 1e-4, max(worst.items(), key=lambda item: item[1])


def test_loss_equals_transformers_in_fp32(pair, monkeypatch):
    theirs, ours, _ = pair
    scenes = [toy_scene(i) for i in (5, 6)]
    x = torch.stack([s[0] for s in scenes])
    truth = [m2f.targets(ids, parts, [False, True, True], "panoptic") for _, ids, parts in scenes]
    monkeypatch.setattr(torch, "rand", same_points)
    with torch.no_grad():
        a = theirs((x - ours.mean) / ours.std, mask_labels=[t["masks"].float() for t in truth],
                   class_labels=[t["labels"] for t in truth]).loss
        b, _ = ours.loss(ours(x), truth)
    assert a.dtype == b.dtype == torch.float32 and abs(a - b) < 1e-4 * abs(a)


@pytest.mark.parametrize("name, queries", [("swin_t", 100), ("swin_s", 100), ("swin_b", 100), ("swin_l", 200)])
def test_every_public_size_by_key_and_shape(name, queries):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs, ours = public_model(name, 133, queries).state_dict(), m2f.Mask2Former(133, name, queries=queries).state_dict()
    theirs = m2f.renamed(theirs)
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_finds_task_and_size_in_the_public_folder(pair):
    _, ours, folder = pair
    assert ours.config["task"] == "instance" and ours.config["backbone"] == "swin_t" and ours.config["num_classes"] == 7
    with open(folder / "config.json") as f:
        config = json.load(f)
    config["backbone_config"]["embed_dim"] = 100
    other = folder / "odd"
    other.mkdir()
    os.link(folder / "model.safetensors", other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="swin_t"):
        m2f.load(other)


def test_pixel_decoder_starts_as_the_original():
    """xavier_uniform for the input projections; fvcore's c2_xavier_fill, uniform within sqrt(3 / fan in), for the rest."""
    torch.manual_seed(0)
    net = m2f.PixelDecoder((64, 128, 256, 512), layers=1)
    cases = [(conv, (6 / (conv.in_channels + 256)) ** 0.5) for conv, _ in net.inputs]
    cases += [(conv, (3 / conv.weight[0].numel()) ** 0.5) for conv in (net.lateral[0], net.smooth[0], net.masks)]
    for conv, bound in cases:
        assert 0.99 * bound < conv.weight.abs().max() <= bound and conv.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.02)
        assert conv.bias is None or conv.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["resnet50", "swin_t"])
def test_big_backbones_train_a_step(name):
    torch.manual_seed(0)
    model = m2f.Mask2Former(3, name, queries=8, encoder_layers=1, decoder_layers=2, points=64)
    _, ids, _ = toy_scene(0)
    loss, _ = model.loss(model(torch.rand(1, 3, 64, 64)), [m2f.targets(ids)])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


def test_command_line_draws_overlays(tmp_path):
    model = m2f.Mask2Former(3, class_names=["sky", "house", "tree"], task="semantic", **TOY)
    m2f.save(model, tmp_path / "model.safetensors")
    for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
        Image.fromarray((toy_scene(i)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).convert(mode).save(tmp_path / f"{mode}.png")
    images = [str(tmp_path / f"{mode}.png") for mode in ("RGB", "L", "RGBA", "P")]
    script = [sys.executable, m2f.__file__, "--weights", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(script + images, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == sorted(f"{mode}.png" for mode in ("RGB", "L", "RGBA", "P"))
    assert min(Image.open(tmp_path / "out" / "RGB.png").size) >= 512
    Image.new("RGB", (3000, 20)).save(tmp_path / "wide.png")
    done = subprocess.run(script + [str(tmp_path / "wide.png")], capture_output=True, text=True)
    assert done.returncode == 0 and "3000 x 20" in done.stdout and Image.open(tmp_path / "out/wide.png").size == (2048, 14)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    for wrong, words in (([str(tmp_path / "broken.png")], "broken.png"), (["--device", "foo"], "foo: looked for cpu, cuda"),
                         ([images[0], "--out", images[1]], "another --out"),
                         ([images[0], "--out", str(tmp_path)], "its overlay would be")):
        before = Path(images[0]).read_bytes()
        done = subprocess.run(script + wrong, capture_output=True, text=True)
        assert Path(images[0]).read_bytes() == before
        assert done.returncode != 0 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    def save(path, kind):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit, match="No space left"):
        m2f.put(SimpleNamespace(save=save), str(tmp_path / "a/x.png"))
    assert not list((tmp_path / "a").iterdir())


# ======================================== unet.py

SMALL = dict(in_channels=4, out_channels=4, block_out_channels=(32, 64, 96), layers_per_block=2,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             transformer_layers_per_block=(1, 2, 3), attention_head_dim=(2, 4, 6), cross_attention_dim=48,
             addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8, norm_num_groups=8)


def error(ours, theirs):
    """Largest difference, relative to the scale of what is right."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def noisy(net, seed=0):
    """The module with random weights everywhere: zero-initialised layers would hide what is behind them.

    Weights keep the scale of their fan-in and norms stay near 1, as in a trained network: with
    weights all of std 0.05 fp32 itself is off by over 1e-5 (the public VAE against itself in fp64: 3e-5)."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        if p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p.data += 1
    return net.eval()


def public_unet(**changes):
    diffusers = pytest.importorskip("diffusers")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return noisy(diffusers.UNet2DConditionModel(
        **SMALL | changes, up_block_types=up, use_linear_projection=True, addition_embed_type="text_time"))


def inputs(size=(24, 16), seed=1):
    """x, t, context, pooled, time_ids of two samples; no two numbers alike."""
    g = torch.Generator().manual_seed(seed)
    time_ids = torch.tensor([[512., 640, 0, 16, 768, 768], [300, 200, 5, 0, 1024, 512]])
    return (torch.randn(2, 4, *size, generator=g), torch.tensor([7.0, 801.5]),
            torch.randn(2, 5, 48, generator=g), torch.randn(2, 32, generator=g), time_ids)


def public_call(net, x, t, context, pooled, time_ids, **more):
    """A public UNet or ControlNet on our arguments -> a tuple."""
    added = dict(text_embeds=pooled, time_ids=time_ids)
    return net(x, t, context, added_cond_kwargs=added, return_dict=False, **more)


def public_config(net):
    """What a config.json holds: JSON turns tuples into lists."""
    return json.loads(json.dumps(dict(net.config)))


# ---- public implementations ----

@torch.no_grad()
def test_unet_equals_the_public_one():
    theirs = public_unet()
    ours = nets.UNet.from_config(public_config(theirs))
    ours.load_state_dict(theirs.state_dict())
    for size in ((24, 16), (20, 12), (18, 14)):     # the last two have an odd grid on the way down
        data = inputs(size)
        right = public_call(theirs, *data)[0]
        assert error(ours(*data), right) < 1e-5
        x, t, context, pooled, time_ids = data
        assert error(ours(x, t, ours.project_text(context), pooled, time_ids), right) < 1e-5
    assert error(ours(*inputs(seed=2)), public_call(theirs, *inputs())[0]) > 0.01       # the inputs matter


@torch.no_grad()
def test_controlnet_equals_the_public_one():
    diffusers = pytest.importorskip("diffusers")
    base = public_unet()
    theirs = noisy(diffusers.ControlNetModel.from_unet(base), seed=3)
    ours = nets.ControlNet.from_config(public_config(theirs))
    unet = nets.UNet.from_config(public_config(base))
    ours.load_state_dict(theirs.state_dict())
    unet.load_state_dict(base.state_dict())
    data, cond = inputs(), torch.rand(2, 3, 24 * 8, 16 * 8)
    for scale in (1.0, 0.3):
        down, middle = public_call(theirs, *data, controlnet_cond=cond, conditioning_scale=scale)
        residuals = ours(*data, cond, scale)
        assert len(residuals[0]) == len(down) and residuals[2] is None
        assert all(error(a, b) < 1e-5 for a, b in zip(residuals[0] + [residuals[1]], [*down, middle]))
        right = public_call(base, *data, down_block_additional_residuals=down,
                            mid_block_additional_residual=middle)[0]
        assert error(unet(*data, residuals), right) < 1e-5
        assert error(unet(*data), right) > 0.01


def test_gradients_equal_the_public_ones():
    theirs = public_unet()
    ours = nets.UNet.from_config(public_config(theirs)).recompute()
    ours.load_state_dict(theirs.state_dict())
    public_call(theirs, *inputs())[0].square().sum().backward()
    ours(*inputs()).square().sum().backward()
    right = dict(theirs.named_parameters())
    assert all(error(p.grad, right[k].grad) < 1e-3 for k, p in ours.named_parameters())


def test_what_we_write_opens_in_the_public_library(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import save_file
    ours = noisy(nets.UNet(**SMALL))
    control = noisy(nets.ControlNet.from_unet(ours))
    data, cond = inputs(), torch.rand(2, 3, 24 * 8, 16 * 8)
    for net, cls in ((ours, diffusers.UNet2DConditionModel), (control, diffusers.ControlNetModel)):
        (tmp_path / "config.json").write_text(json.dumps(net.public_config()))
        save_file(net.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
        theirs = cls.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        with torch.no_grad():
            if net is ours:
                assert error(ours(*data), public_call(theirs, *data)[0]) < 1e-5
            else:
                right = public_call(theirs, *data, controlnet_cond=cond)[1]
                assert error(control(*data, cond)[1], right) < 1e-5


@torch.no_grad()
def test_vae_equals_the_public_one():
    diffusers = pytest.importorskip("diffusers")
    theirs = noisy(diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 48), layers_per_block=2, norm_num_groups=8, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))
    ours = nets.VAE.from_config(public_config(theirs))
    ours.load_state_dict(theirs.state_dict())
    x, z = torch.randn(3, 3, 64, 48), torch.randn(3, 4, 8, 6)
    right = theirs.encode(x).latent_dist
    mean, std = ours.moments(x, slices=2)
    assert error(mean, right.mean) < 1e-5 and error(std, right.std) < 1e-5
    torch.manual_seed(0)
    sample = ours.encode(x)
    torch.manual_seed(0)
    assert error(sample, (right.mean + right.std * torch.randn_like(mean)) * 0.13025) < 1e-5
    assert error(ours.decode(z * 0.13025, slices=2), theirs.decode(z).sample) < 1e-5
    ours, theirs, z = ours.double(), theirs.double(), z.double()
    assert error(ours.decode(z * 0.13025), theirs.decode(z).sample) < 1e-11             # not a rounding apart


@torch.no_grad()
@pytest.mark.parametrize("act, projection, eos, pad", [("quick_gelu", False, 2, 299), ("gelu", True, 2, 0),
                                                       ("gelu", True, 299, 299)])
def test_clip_equals_the_public_one(act, projection, eos, pad):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=24, hidden_act=act, eos_token_id=eos, bos_token_id=0, pad_token_id=1)
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = noisy(cls(config))
    state = json.loads(config.to_json_string(use_diff=False))
    ours = nets.CLIPText.from_config({k: state[k] for k in state if k in nets.public_arguments(nets.CLIPText)}
                                     | {"architectures": [cls.__name__], "model_type": "clip_text_model"})
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 290, (3, 77))
    for row, end in zip(tokens, (5, 40, 76)):
        row[0], row[end:] = 298, pad
        row[end] = 299
    right = theirs(tokens, output_hidden_states=True)
    context, pooled = ours(tokens)
    assert error(context, right.hidden_states[-2]) < 1e-5
    assert error(pooled, right.text_embeds if projection else right.pooler_output) < 1e-5


def test_full_sdxl_has_the_public_keys_and_shapes():
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = nets.UNet()
        theirs = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_time_embed_dim=256,
            addition_embed_type="text_time", projection_class_embeddings_input_dim=2816,
            cross_attention_dim=2048)
        read = nets.UNet.from_config(public_config(theirs))
        control = diffusers.ControlNetModel.from_unet(theirs, load_weights_from_unet=False)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        pairs = [(ours, theirs), (nets.ControlNet(), control), (nets.VAE(), vae)]
        shape = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        config = transformers.CLIPTextConfig(**shape, projection_dim=1280, hidden_act="gelu")
        pairs.append((nets.CLIPText(**nets.PRESETS["sdxl"]["text_encoder_2"]),
                      transformers.CLIPTextModelWithProjection(config)))
        first = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        config = transformers.CLIPTextConfig(**first, projection_dim=768)
        theirs_first = transformers.CLIPTextModel(config)
    keys = {"text_model." + k.removeprefix("text_model."): v.shape      # recent versions drop the prefix
            for k, v in theirs_first.state_dict().items()}
    with torch.device("meta"):
        assert keys == {k: v.shape for k, v in nets.CLIPText().state_dict().items()}
    assert public_config(read) == public_config(ours)
    written = json.loads(json.dumps(ours.public_config()))
    assert written | public_config(theirs) == public_config(theirs) | dict(_class_name="UNet2DConditionModel")
    for ours, theirs in pairs:
        assert ({k: v.shape for k, v in ours.state_dict().items()} ==
                {k: v.shape for k, v in theirs.state_dict().items()}), type(ours).__name__


def write_tokenizer(folder):
    """A small vocabulary in CLIP's format, its merges trained on the captions below."""
    words = [[c for c in w] for w in " ".join(CAPTIONS).lower().split() if w.isascii() and w.isalpha()]
    for w in words:
        w[-1] += "</w>"
    merges = []
    while len(merges) < 60:
        pairs = [p for w in words for p in zip(w, w[1:])]
        pair = max(sorted(set(pairs)), key=pairs.count)
        merges.append(pair)
        words = [nets.merged(w, pair) for w in words]
    single = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    vocab = [*single, *(c + "</w>" for c in single), *map("".join, merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    os.makedirs(folder, exist_ok=True)
    with open(folder / "vocab.json", "w", encoding="utf-8") as f:
        json.dump({v: i for i, v in enumerate(vocab)}, f)
    with open(folder / "merges.txt", "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(" ".join(p) + "\n" for p in merges))


CAPTIONS = [
    "A woman's cat, that's 12 years old, isn't on the red and white mat!!",
    "they're we've I'm he'll you'd don't 'tis ''s 'S",
    "a   tab\tand\nnew line\u00a0no break \u3000wide \u2028 line \x1c \x85 next", "", "   ", "...",
    "3.14159 \u00bd \u00b2 \u2167 \u0663",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcber \u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2"
    " \u039f\u0394\u039f\u03a3 \u00df \u1e9e \ufb01",
    "\U0001f642\U0001f469\u200d\U0001f4bb flag \U0001f1e9\U0001f1ea \u2764\ufe0f emoji\U0001f600text",
    "\u4e00\u53ea\u732b \u0441\u043e\u0431\u0430\u043a\u0430 \u05d7\u05ea\u05d5\u05dc"
    " \u0939\u093f\u0928\u094d\u0926\u0940",
    "a long caption " * 40, "x" * 300,
    "under_score a-b c/d #tag @you 100% $5 <b> a<|endoftext|>b <|startoftext|> <|ENDOFTEXT|>",
    "zero\u200bwidth soft\u00adhyphen \x00 nul \x7f del \ue000 private",
    "\u1e9b\u0323 \uac00 \u1100\u1161 \u212b \u2126",
]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokenizer_equals_the_public_one(tmp_path, pad):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path), pad_token=pad)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    ours = nets.CLIPTokenizer(tmp_path)
    captions = list(CAPTIONS)
    folder = os.environ.get("SEGGEN_TEST_DATA")
    if folder:
        with open(os.path.join(folder, "coco", "annotations", "captions_val2017.json")) as f:
            captions += [a["caption"] for a in json.load(f)["annotations"]]
    rng = random.Random(0)
    letters = "".join(CAPTIONS)
    captions += ["".join(rng.choices(letters, k=30)) for _ in range(300)]
    for caption in captions:
        right = theirs(caption, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ours([caption])[0].tolist() == right, caption
    theirs.save_pretrained(tmp_path / "saved")                  # recent versions write tokenizer.json alone
    assert torch.equal(nets.CLIPTokenizer(tmp_path / "saved")(captions), ours(captions))


# ---- properties ----

def tiny(seed=0):
    """UNet, ControlNet, TextEncoder of the tiny preset with noise in all weights but the ControlNet's own."""
    torch.manual_seed(seed)
    preset = nets.PRESETS["tiny"]
    unet, text = noisy(nets.UNet(**preset["unet"])), nets.TextEncoder(**preset["text"]).eval()
    return unet, nets.ControlNet.from_unet(unet, **preset["controlnet"]).eval(), text


def tiny_inputs(text, captions):
    torch.manual_seed(1)
    b = len(captions)
    context, pooled = text(text.tokenize(captions))
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * b)
    return torch.randn(b, 3, 64, 64), torch.linspace(10, 900, b), context, pooled, ids


def test_the_shapes_that_are_printed():
    with torch.device("meta"), torch.no_grad():
        unet, _, text = tiny()
        assert nets.shapes(unet) == "x (1, 3, 64, 64), context (1, 48, 96) -> (1, 3, 64, 64)"
        assert nets.shapes(text) == "tokens (1, 48) -> context (1, 48, 96), pooled (1, 96)"


@torch.no_grad()
def test_controlnet_adds_nothing_until_trained_and_something_after():
    unet, control, text = tiny()
    data, cond = tiny_inputs(text, ["a red ball", "two cats"]), torch.rand(2, 3, 64, 64)
    own = control.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in unet.state_dict().items() if k in own)
    assert torch.equal(unet(*data, control(*data, cond)), unet(*data))
    residuals = noisy(control)(*data, cond)
    assert residuals[2].shape == (2, unet.config["head_channels"], 64, 64)
    full = unet(*data, residuals)
    assert error(full, unet(*data)) > 1e-3
    assert error(unet(*data, control(*data, cond.flip(0))), full) > 1e-3
    assert error(unet(*data, control(*data, cond, 0.0)), unet(*data)) < 1e-6


@torch.no_grad()
def test_batched_equals_single_and_the_caption_matters():
    unet, control, text = tiny()
    control = noisy(control)
    captions = ["a red ball", "", "a much longer caption, with \u00fcml\u00e4uts " * 9]
    data, cond = tiny_inputs(text, captions), torch.rand(3, 3, 64, 64)
    together = unet(*data, control(*data, cond))
    assert together.shape == (3, 3, 64, 64) and together.isfinite().all()
    for i in range(3):
        one = [d[i:i + 1] for d in data]
        assert error(unet(*one, control(*one, cond[i:i + 1])), together[i:i + 1]) < 1e-5
    x, t, context, pooled, ids = data
    assert error(unet(x, t, context.roll(1, 0), pooled, ids), unet(*data)) > 1e-4
    assert error(unet(x, t, context, pooled.roll(1, 0), ids), unet(*data)) > 1e-4
    assert error(unet(x, t.roll(1, 0), context, pooled, ids), unet(*data)) > 1e-4
    assert error(unet(x, t, context, pooled, ids * 2), unet(*data)) > 1e-4


@torch.no_grad()
def test_text_encoder_tells_words_apart_and_an_empty_caption_is_the_null_condition():
    text = nets.TextEncoder(length=12).eval()
    tokens = text.tokenize(["a cat,", "\u00e9t\u00e9 " * 50, ""])
    assert tokens.shape == (3, 12) and (tokens > 0).sum(1).tolist() == [3, 12, 0]
    context, pooled = text(tokens)
    assert (context[0, 3:] == 0).all() and (context[0, :3] != 0).all(1).all() and pooled.isfinite().all()
    assert (context[2] == 0).all() and (pooled[2] == 0).all()
    words = ["".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(2000)]
    pairs = {(n % 1024, n // 1024 % 1024) for n in text.tokenize(words)[:, 0].tolist()}
    assert len(pairs) == len(set(words))                  # no two of 2,000 words share both rows
    assert torch.equal(text.tokenize(["A CAT ,"]), tokens[:1])
    assert not torch.allclose(text(text.tokenize(["a car,"]))[1], pooled[:1])


@torch.no_grad()
def test_a_network_comes_back_from_its_config():
    unet, control, text = tiny()
    data, cond = tiny_inputs(text, ["a red ball"]), torch.rand(1, 3, 64, 64)
    for net, args in ((unet, data), (noisy(control), (*data, cond)), (text, (text.tokenize(["x"]),))):
        again = type(net)(**json.loads(json.dumps(net.config)))
        again.load_state_dict(net.state_dict())
        outs = [torch.utils._pytree.tree_leaves(out) for out in (net(*args), again.eval()(*args))]
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_recomputed_gradients_are_the_same():
    unet, _, text = tiny()
    data = [d.detach() for d in tiny_inputs(text, ["a red ball", "two cats"])]
    grads, calls = [], []
    inner = unet.down_blocks[0].resnets[0].conv1, unet.mid_block.attentions[0].transformer_blocks[0].ff
    for module in inner:
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True):
        unet.recompute(on).zero_grad()
        unet(*data).square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters()])
        assert len(calls) == (4 if on else 2)                            # each once more in backward
        calls.clear()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


def test_a_configuration_of_another_kind_is_refused():
    good = nets.UNet(**SMALL).public_config()
    other = {"down_block_types": ["AttnDownBlock2D"] * 3, "up_block_types": ["AttnUpBlock2D"] * 3}
    for change, word in (({"addition_embed_type": None}, "addition_embed"), ({"act_fn": "gelu"}, "act_fn"),
                         ({"new_option": 3}, "new_option"), ({"class_embed_type": "timestep"}, "class_embed"),
                         (other, "AttnDown"), ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types")):
        with pytest.raises(ValueError, match=word):
            nets.UNet.from_config(good | change)
    with pytest.raises(ValueError, match="cross_attention_dim"):
        nets.UNet.from_config({k: v for k, v in good.items() if k != "cross_attention_dim"})
    nets.UNet.from_config(good | {"new_option": None, "sample_size": 128})
    with pytest.raises(ValueError, match="vocab.json"):
        nets.CLIPTokenizer("no such folder")


# ======================================== Paper scale: a folder of SDXL, at toy widths

@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A small SDXL with random weights, written by the public pipeline itself; a second one as fp16 in shards."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("sdxl")
    write_tokenizer(out / "words")
    words = [transformers.CLIPTokenizer.from_pretrained(str(out / "words"), pad_token=p, model_max_length=77)
             for p in ("<|endoftext|>", "!")]
    text = [noisy(cls(transformers.CLIPTextConfig(
        vocab_size=len(words[0]), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, hidden_act=act,
        num_attention_heads=2, projection_dim=width, eos_token_id=2, bos_token_id=0, pad_token_id=1)))
        for cls, width, act in ((transformers.CLIPTextModel, 16, "quick_gelu"),
                                (transformers.CLIPTextModelWithProjection, 24, "gelu"))]
    net = noisy(diffusers.UNet2DConditionModel(
        **SMALL | dict(block_out_channels=(16, 32), layers_per_block=1, transformer_layers_per_block=(1, 2),
                       attention_head_dim=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                       cross_attention_dim=40, projection_class_embeddings_input_dim=24 + 6 * 8),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, addition_embed_type="text_time"))
    vae = noisy(diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))
    pipe = diffusers.StableDiffusionXLPipeline(
        vae, *text, *words, net, diffusers.EulerDiscreteScheduler(**SDXL_NOISE), add_watermarker=False)
    pipe.save_pretrained(out / "base")
    pipe.to(torch.float16).save_pretrained(out / "half", variant="fp16", max_shard_size="200KB")
    return out


SDXL_NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                  timestep_spacing="leading", steps_offset=1, prediction_type="epsilon")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six pairs of 48 x 48 with captions."""
    out = tmp_path_factory.mktemp("photos")
    for seed, split in enumerate(("train", "val")):
        folder(out / split, seed=seed, size=48)
        (out / split / "captions").mkdir()
        for i in range(6):
            (out / split / f"captions/{i:03d}.txt").write_text("a cat on the mat\na red and white mat\n")
    return out


def run(monkeypatch, module, *args):
    """A command of a script, in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


def paper(base, photos, out, **more):
    """The flags of a small training on a folder of SDXL."""
    flags = dict(init=base, data=photos, out=out, size=48, batch=2, steps=3, workers=0, device="cpu") | more
    return [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", value)]


@torch.no_grad()
def test_sdxl_text_is_what_the_public_pipeline_encodes(sdxl):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl / "base")
    ours = nets.SDXLText.read(sdxl / "base")
    captions = ["a woman's cat", "", "the red mat " * 40]
    tokens = ours.tokenize(captions)
    context, pooled = ours(tokens)
    for i in (0, 2):
        theirs = pipe.encode_prompt(captions[i], do_classifier_free_guidance=True, device="cpu", num_images_per_prompt=1)
        assert error(context[i:i + 1], theirs[0]) < 1e-5 and error(pooled[i:i + 1], theirs[2]) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip((context[1:2], pooled[1:2]), theirs[1::2]))     # both are zeros
    assert tokens.shape == (3, 2, 77) and not tokens[1].any() and not context[1].any()
    dropped = text2mask.dropped(tokens, torch.tensor([True, False, False]))
    assert torch.equal(dropped[0], tokens[0]) and not dropped[1:].any()
    assert not any(p.requires_grad for p in ours.parameters())


def test_sdxl_parts_in_fp16_and_in_shards(sdxl):
    whole, half = (nets.read_part(nets.UNet, sdxl / name / "unet") for name in ("base", "half"))
    assert len(nets.weight_files(sdxl / "half" / "unet")) > 1
    for name, p in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], p.half().float()), name
    assert nets.SDXLText.read(sdxl / "half").text_encoder_2.text_projection.weight.dtype == torch.float32
    assert nets.read_part(nets.VAE, sdxl / "half" / "vae", dtype=torch.bfloat16).quant_conv.weight.dtype == torch.bfloat16


def test_sdxl_end_to_end_and_the_public_pipeline_agrees(sdxl, photos, tmp_path, monkeypatch):
    """Both trainings, both syntheses; then the public ControlNet pipeline paints our image with what we wrote."""
    diffusers = pytest.importorskip("diffusers")
    import imgsyn
    import mask2img
    import masksyn
    base = sdxl / "base"
    run(monkeypatch, text2mask, "train", *paper(base, photos, tmp_path / "t", min_snr=5, noise_offset=0.05))
    run(monkeypatch, mask2img, "train", *paper(base, photos, tmp_path / "m"))
    for out, cls in ((tmp_path / "t", diffusers.UNet2DConditionModel), (tmp_path / "m", diffusers.ControlNetModel)):
        state = torch.load(out / "state.pt", weights_only=True)
        theirs = cls.from_pretrained(out, low_cpu_mem_usage=False)
        part = {"t": "unet.", "m": "controlnet."}[out.name]
        assert {part + name for name in theirs.state_dict()} == set(state["model"]) == set(state["ema"])
        assert all(torch.equal(p, state["ema"][part + name]) for name, p in theirs.state_dict().items())
    shared = diffusion.load(text2mask.Text2Mask, tmp_path / "t"), diffusion.load(mask2img.Mask2Img, tmp_path / "m")
    assert shared[0].text is shared[1].text and shared[0].vae is shared[1].vae             # once in memory
    unet = shared[1].unet.state_dict()
    for name, p in shared[1].controlnet.state_dict().items():             # 3 steps of 1e-5 from copy and zero
        if name in unet or ".conv_out." in name or name.startswith(("controlnet_down", "controlnet_mid")):
            assert (p - unet.get(name, 0)).abs().max() < 1e-4, name
    shared[0].text.__dict__.pop("memory", None)
    encoded = []
    hook = shared[0].text.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    run(monkeypatch, masksyn, "--data", photos, "--text2mask", tmp_path / "t", "--mask2img", tmp_path / "m", "--limit", 3,
        "--batch", 2, "--steps", 3, "--mask-steps", 3, "--out", tmp_path / "pairs", "--device", "cpu")
    hook.remove()
    assert encoded == [1, 1]                                              # one caption of all pairs, and none
    run(monkeypatch, imgsyn, "--data", photos, "--mask2img", tmp_path / "m", "--limit", 3, "--steps", 3, "--out",
        tmp_path / "again", "--device", "cpu")
    for pairs in ("pairs", "again"):
        assert len(list((tmp_path / pairs / "images").iterdir())) == 3
        assert Image.open(tmp_path / pairs / "images/000_00.png").size == (48, 48)
    model = shared[1]
    noisy(model.controlnet, seed=5)                                       # three steps from zero would hide its work
    model.controlnet.controlnet_cond_embedding.conv_out.weight.data *= 30
    diffusion.save(model, tmp_path / "loud")
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        base, controlnet=diffusers.ControlNetModel.from_pretrained(tmp_path / "loud"), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    codes = torch.randint(0, 5, (1, 48, 48), generator=torch.Generator().manual_seed(0))
    cond = model.condition(codes)
    noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(7))
    for guidance in (1.0, 4.0):
        ours = model.draw(["a red cat"], [7], 8, guidance, "euler", (48, 48), (cond,), (cond,))
        theirs = pipe("a red cat", image=cond, height=48, width=48, num_inference_steps=8, guidance_scale=guidance,
                      latents=noise, output_type="pt").images
        assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-3
        assert ours.clamp(-1, 1).std() > 0.05                              # a picture, not one colour
    other = model.draw(["a red cat"], [7], 8, 1.0, "euler", (48, 48), (cond.flip(3),))
    assert (other - model.draw(["a red cat"], [7], 8, 1.0, "euler", (48, 48), (cond,))).abs().max() > 1e-2


@pytest.mark.parametrize("depth", [2, 1])
def test_a_public_controlnet_is_trained_on(sdxl, photos, tmp_path, monkeypatch, depth):
    """One as deep as the UNet's encoder, and a smaller one; one of other widths is refused."""
    diffusers = pytest.importorskip("diffusers")
    import mask2img
    net = diffusers.UNet2DConditionModel.from_pretrained(sdxl / "base" / "unet")
    own = diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 8, 16, 32)).config
    own = dict(own) | dict(transformer_layers_per_block=(1, depth))
    theirs = noisy(diffusers.ControlNetModel.from_config(own), seed=4)
    theirs.save_pretrained(tmp_path / "theirs")
    run(monkeypatch, mask2img, "train", *paper(sdxl / "base", photos, tmp_path / "m", steps=1, lr=1e-12,
                                               controlnet=tmp_path / "theirs"))
    ours = diffusion.load(mask2img.Mask2Img, tmp_path / "m").controlnet.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.allclose(p, ours[name], atol=1e-6) for name, p in theirs.state_dict().items())
    wide = diffusers.ControlNetModel.from_config(own | dict(block_out_channels=(16, 48)))
    wide.save_pretrained(tmp_path / "wide")
    flags = paper(sdxl / "base", photos, tmp_path / "no", controlnet=tmp_path / "wide")
    with pytest.raises(SystemExit, match="block_out_channels"):
        run(monkeypatch, mask2img, "train", *flags)


def test_a_stopped_sdxl_training_resumes_bit_for_bit(sdxl, photos, tmp_path, monkeypatch):
    for out in ("whole", "parts"):
        run(monkeypatch, text2mask, "train", *paper(sdxl / "base", photos, tmp_path / out, lr=1e-3, save_every=2))
        if out == "whole":
            (tmp_path / "parts").mkdir()
            save = diffusion.save_state
            def stop(*args, **kw):
                save(*args, **kw)
                raise KeyboardInterrupt
            monkeypatch.setattr(diffusion, "save_state", stop)
            with pytest.raises(KeyboardInterrupt):
                run(monkeypatch, text2mask, "train", *paper(sdxl / "base", photos, tmp_path / "parts", lr=1e-3, save_every=2))
            monkeypatch.setattr(diffusion, "save_state", save)
            assert torch.load(tmp_path / "parts/state.pt", weights_only=True)["step"] == 2
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_bf16_as_on_a_gpu(sdxl, photos, tmp_path, monkeypatch):
    """What CUDA does, on the CPU: autocast in training, frozen weights and sampling in bf16, VAE fp32."""
    import mask2img
    import masksyn
    losses, drawn = {}, []
    for kind in (torch.float32, torch.bfloat16):
        text2mask.frozen.cache_clear()
        monkeypatch.setattr(diffusion, "precision", lambda device: kind)
        for module, name in ((text2mask, "t"), (mask2img, "m")):
            run(monkeypatch, module, "train", *paper(sdxl / "base", photos, tmp_path / f"{name}{kind}", steps=1))
            log = (tmp_path / f"{name}{kind}" / "log.jsonl").read_text()
            losses.setdefault(name, []).append(json.loads(log)["loss"])
        text2mask.frozen.cache_clear()
        model = diffusion.load(mask2img.Mask2Img, tmp_path / "mtorch.float32")           # the same network
        cond = model.condition(torch.arange(48 * 48).reshape(1, 48, 48) % 5)
        drawn.append(model.draw(["a red cat"], [7], 4, 3.0, "dpm++", (48, 48), (cond,), (cond,)))
    assert 0 < error(drawn[1], drawn[0]) < 0.05
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "autocast", None)                        # bf16 weights are sampled without
        run(monkeypatch, masksyn, "--data", photos, "--text2mask", tmp_path / "ttorch.bfloat16", "--mask2img",
            tmp_path / "mtorch.bfloat16", "--limit", 2, "--steps", 2, "--mask-steps", 2, "--device", "cpu",
            "--out", tmp_path / "pairs")
    assert len(list((tmp_path / "pairs" / "images").iterdir())) == 2
    text2mask.frozen.cache_clear()
    model = diffusion.load(mask2img.Mask2Img, tmp_path / "mtorch.bfloat16")
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in model.named_children()}
    assert kinds == dict(unet={torch.bfloat16}, text={torch.bfloat16}, vae={torch.float32}, controlnet={torch.bfloat16})
    assert all(abs(a - b) < 0.05 * a and a != b for a, b in losses.values())
    state = torch.load(tmp_path / "ttorch.bfloat16/state.pt", weights_only=True)
    assert all(p.dtype == torch.float32 for p in state["model"].values())                  # what is trained stays fp32
    text2mask.frozen.cache_clear()


def test_sharded_training_equals_copies_and_leaves_whole_files(sdxl, photos, tmp_path):
    """Two ranks: DDP, and fully_shard stopped half-way and started again, end in the same state."""
    (tmp_path / "stopped.py").write_text(
        "import sys, diffusion, text2mask\n"
        "from torch.distributed.tensor import DTensor\n"
        "save = diffusion.save_state\n"
        "def stop(out, average, optimiser, *args):\n"
        "    moments = [t for s in optimiser.state.values() for t in (s['exp_avg'], s['exp_avg_sq'])]\n"
        "    for held in (average.params.values(), average.shadow.values(), moments):\n"
        "        assert all(isinstance(t, DTensor) for t in held)\n"
        "        assert sum(t.to_local().numel() for t in held) < 0.6 * sum(t.numel() for t in held)\n"
        "    save(out, average, optimiser, *args)\n"
        "    sys.exit()\n"
        "diffusion.save_state = stop\n"
        "text2mask.main()\n")
    flags = dict(batch=1, lr=1e-3, steps=4, save_every=2)
    for port, (file, out, more) in enumerate((
            ("text2mask.py", "ddp", ()), (tmp_path / "stopped.py", "shard", ("--shard",)),
            ("text2mask.py", "shard", ("--shard",))), 29541):
        script("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, file, "train",
               *paper(sdxl / "base", photos, tmp_path / out, **flags), *more, OMP_NUM_THREADS="1")
        state = torch.load(tmp_path / out / "state.pt", weights_only=True)
        assert state["step"] == (2 if file != "text2mask.py" else 4)
    states = [torch.load(tmp_path / out / "state.pt", weights_only=True) for out in ("ddp", "shard")]
    for key in ("model", "ema"):
        assert states[0][key].keys() == states[1][key].keys()
        assert all(torch.allclose(p, states[1][key][name], atol=1e-5) for name, p in states[0][key].items())
    for values in zip(*(state["optimiser"]["state"].values() for state in states)):
        assert all(torch.allclose(values[0][k], values[1][k], atol=1e-5) for k in ("step", "exp_avg", "exp_avg_sq"))
    trained = diffusion.load(text2mask.Text2Mask, tmp_path / "shard").unet.state_dict()
    assert all(torch.equal(p, states[1]["ema"]["unet." + name]) for name, p in trained.items())
    lone = script("text2mask.py", "train", *paper(sdxl / "base", photos, tmp_path / "one"), "--shard", ok=False)
    assert "torchrun" in lone.stderr


def spoiled_sdxl(base, out, how):
    """A copy of a folder of SDXL in which one thing is wrong."""
    shutil.copytree(base, out)
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file
    if how in ("missing key", "extra key", "other shape"):
        state = load_file(weights)
        bias = state.pop("conv_in.bias")
        state |= {"extra key": {"conv_in.bias": bias, "lora.up": bias.clone()},
                  "other shape": {"conv_in.bias": bias[1:].clone()}}.get(how, {})
        save_file(state, weights)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif how in ("no end token", "other merges", "a token too many"):
        path = out / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        ids, merges = content["model"]["vocab"], content["model"]["merges"]
        {"no end token": lambda: ids.pop(nets.END), "other merges": lambda: merges.append(["qq", "zz"]),
         "a token too many": lambda: ids.update(new=len(ids))}[how]()
        path.write_text(json.dumps(content), encoding="utf-8")
    elif how == "sd 1.5":
        (out / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    elif how in ("vae", "text_encoder_2", "scheduler"):
        shutil.rmtree(out / how)
    elif how in ("unet/config.json", "model_index.json", "tokenizer_2/tokenizer.json", "text_encoder/model.safetensors"):
        (out / how).unlink()
    else:                                                                 # "part: key = value"
        part, key, value = re.fullmatch(r"(.*): (.*) = (.*)", how).groups()
        path = out / part
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: json.loads(value)}))
    return out


@pytest.mark.parametrize("how, words", [
    ("missing key", "conv_in.bias is missing"), ("extra key", "lora.up is not one"), ("other shape", "another shape"),
    ("truncated", "truncated"), ("pickle", "never a pickle"), ("sd 1.5", "found StableDiffusionPipeline"),
    ("vae", "found no vae"), ("text_encoder_2", "found no text_encoder_2"), ("scheduler", "found no scheduler"),
    ("unet/config.json", "config.json"), ("model_index.json", "model_index.json"),
    ("tokenizer_2/tokenizer.json", "vocab.json"), ("text_encoder/model.safetensors", "text_encoder"),
    ("unet/config.json: addition_embed_type = null", "addition_embed_type"),
    ("unet/config.json: block_out_channels = [16, 48]", "another shape"), ("vae/config.json: _class_name = \"VQModel\"", "VQModel"),
    ("scheduler/scheduler_config.json: beta_start = 0.1", "beta_start"),
    ("scheduler/scheduler_config.json: beta_start = null", "beta_start = None"),
    ("scheduler/scheduler_config.json: timestep_spacing = \"no\"", "timestep_spacing = 'no'"),
    ("scheduler/scheduler_config.json: prediction_type = \"flow\"", "prediction_type = 'flow'"),
    ("unet/config.json: in_channels = 9", "in_channels is 9, not 4"),
    ("unet/config.json: cross_attention_dim = 48", "cross_attention_dim is 48, not 40"),
    ("unet/config.json: projection_class_embeddings_input_dim = 80", "is 80, not 72"),
    ("tokenizer_2/tokenizer.json: model = null", "'<|startoftext|>'"), ("no end token", "'<|endoftext|>'"),
    ("tokenizer_2/tokenizer_config.json: pad_token = null", "no None"), ("other merges", "'qqzz'"),
    ("a token too many", "vocab_size"),
    ("text_encoder/config.json: hidden_act = \"relu\"", "hidden_act")])
def test_a_wrong_sdxl_folder_is_told_in_one_line(sdxl, photos, tmp_path, monkeypatch, how, words):
    base = spoiled_sdxl(sdxl / "base", tmp_path / "base", how)
    with pytest.raises(SystemExit) as told:
        run(monkeypatch, text2mask, "train", *paper(base, photos, tmp_path / "out"))
    assert words in str(told.value) and "\n" not in str(told.value), told.value
    assert not (tmp_path / "out").exists()                                # nothing half-written


def test_flags_that_do_not_fit_are_told_in_one_line(sdxl, photos, tmp_path, monkeypatch):
    import mask2img
    flags = paper(sdxl / "base", photos, tmp_path / "out")
    for module, args, words in ((text2mask, ("train", "--min-snr", 5), "min-snr"),
                                (text2mask, ("train", "--shard"), "shard"),
                                (mask2img, ("train", "--controlnet", tmp_path), "controlnet"),
                                (mask2img, ("train", *flags, "--unfreeze"), "unfreeze"),
                                (mask2img, ("base", *flags), "from scratch")):
        with pytest.raises(SystemExit, match=words):
            run(monkeypatch, module, *args)
    with pytest.raises(SystemExit):
        run(monkeypatch, text2mask, "train", *flags, "--size", 44)
    with pytest.raises(SystemExit, match="VAE's factor 8"):
        text2mask.TextToImage(base=sdxl / "base", size=(44, 48))


def test_defaults_follow_the_base(sdxl, photos, monkeypatch):
    seen = []
    monkeypatch.setattr(text2mask, "train", seen.append)
    for init in ((), ("--init", sdxl / "base"), ("--init", sdxl / "base", "--lr", 3e-6, "--no-checkpointing")):
        run(monkeypatch, text2mask, "train", *init)
    assert [(a.lr, a.steps, a.size, a.checkpointing) for a in seen] == [
        (2e-3, 5000, (64, 64), False), (1e-5, 30000, (768, 768), True), (3e-6, 30000, (768, 768), False)]


def test_min_snr_weights_follow_the_paper():
    """2303.09556: min(SNR, 5) / SNR for noise, / (SNR + 1) for v."""
    t = torch.tensor([1, 100, 500, 999])
    for prediction in ("epsilon", "v_prediction"):
        schedule = diffusion.Schedule(prediction=prediction)
        a2 = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
        snr = a2 / (1 - a2)
        right = snr.clamp(max=5) / (snr + (prediction == "v_prediction"))
        assert torch.allclose(schedule.weight(t, 5.0).double(), right, rtol=1e-3)


# ======================================== CUDA

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def full_fp32(monkeypatch):
    """No TF32, which keeps 10 bits of a factor's 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def moved(things, device):
    return [thing.to(device) for thing in things]


@gpu
@torch.no_grad()
def test_the_diffusion_networks_agree_with_the_cpu(full_fp32):
    unet, control, text = tiny()
    noisy(control)
    data, cond = tiny_inputs(text, ["a red ball", "two cats"]), torch.rand(2, 3, 64, 64)
    right = unet(*data, control(*data, cond))
    unet, control = moved((unet, control), "cuda")
    data, cond = moved(data, "cuda"), cond.cuda()
    assert error(unet(*data, control(*data, cond)).cpu(), right) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        assert 0 < error(unet(*data, control(*data, cond)).float().cpu(), right) < 0.05


@gpu
@pytest.mark.parametrize("preset", ["tiny", "resnet50", "swin_t"])
def test_mask2former_agrees_with_the_cpu(full_fp32, preset, monkeypatch):
    """Outputs, loss and gradients of one model on both, points drawn on the CPU. Masked attention cuts at zero, so a
    rounding may open or close a pixel: gradients are compared as a whole."""
    torch.manual_seed(0)
    monkeypatch.setattr(m2f, "draw", lambda n, points, device: torch.rand(n, points, 2).mul_(2).sub_(1).to(device))
    scenes = [toy_scene(seed) for seed in range(2)]
    x, things = torch.stack([scene[0] for scene in scenes]), [False, True, True]
    model = m2f.Mask2Former(3, isthing=things, **dict(m2f.PRESETS[preset], points=1024)).eval()
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        goal = [m2f.targets(ids, parts, things, "panoptic") for _, ids, parts in scenes]
        outputs = model(x.to(device))
        torch.manual_seed(1)
        loss = model.loss(outputs, goal)[0]
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), grads, outputs[-1]["mask_logits"].detach().cpu()))
    (a, g, m), (b, h, n) = found
    assert abs(a - b) < 1e-3 * a and error(n, m) < 1e-2
    assert F.cosine_similarity(g, h, 0) > 0.999


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", ["mask2img.py base --split train --size 32", "text2mask.py train --size 32",
                                   "mask2img.py train --size 32", "train.py --splits val --task panoptic"])
def test_mixed_precision_learns_as_fp32_on_the_cpu(shapes, tmp_path, stage, compiled):
    """The first 50 steps of a training: weights stay fp32; the mean loss is the same but for other noise."""
    losses = []
    for device in ("cpu", "cuda"):
        more = ["--compile"] if compiled and device == "cuda" else []
        out = tmp_path / device
        script(*stage.split(), "--data", shapes, "--device", device, "--batch", 4, "--steps", 50, "--out", out, *more)
        losses.append(json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"])
        state = torch.load(out / "state.pt", weights_only=True, map_location="cpu")
        assert all(t.dtype != torch.bfloat16 for t in state["model"].values())
    assert abs(losses[0] - losses[1]) < 0.2 * losses[0], losses


@gpu
def test_a_gpu_paints_what_the_cpu_paints(shapes, tmp_path):
    """Each sample's noise is drawn on the CPU, so that the shipped weights give the same pairs but for rounding."""
    for device in ("cpu", "cuda"):
        script("masksyn.py", "--data", shapes, *demo(), "--limit", 8, "--device", device, "--out", tmp_path / device)
    same = apart = 0
    for path in sorted((tmp_path / "cpu/masks").iterdir()):
        masks, images = ([np.asarray(Image.open(tmp_path / device / part / path.name).convert(kind)).astype(int)
                          for device in ("cpu", "cuda")] for part, kind in (("masks", "P"), ("images", "RGB")))
        same, apart = same + (masks[0] == masks[1]).mean() / 8, apart + np.abs(images[0] - images[1]).mean() / 8
    assert same > 0.97 and apart < 4, (same, apart)


@gpu
def test_a_gpu_run_that_was_stopped_goes_on(shapes, tmp_path):
    """Some kernels add in no fixed order: to rounding, not bit for bit."""
    flags = ["text2mask.py", "train", "--data", shapes, "--size", 32, "--batch", 4, "--save-every", 10, "--device", "cuda"]
    script(*flags, "--steps", 20, "--out", tmp_path / "whole")
    kill = "import diffusion, os\nsave = diffusion.save_state\ndef stop(*a):\n    save(*a)\n    os._exit(9)\n" \
           "diffusion.save_state = stop\nimport text2mask\ntext2mask.main()"
    argv = [sys.executable, "-c", kill, *map(str, flags[1:]), "--steps", "20", "--out", str(tmp_path / "cut")]
    assert subprocess.run(argv, cwd=REPO, capture_output=True).returncode == 9
    assert torch.load(tmp_path / "cut/state.pt", weights_only=True, map_location="cpu")["step"] == 10
    script(*flags, "--steps", 20, "--out", tmp_path / "cut")
    whole, cut = (torch.load(tmp_path / out / "state.pt", weights_only=True, map_location="cpu")["model"]
                  for out in ("whole", "cut"))
    assert all(error(cut[name].float(), t.float()) < 0.02 for name, t in whole.items() if t.abs().max() > 0)


@gpu
def test_a_forward_pass_never_waits_for_the_gpu():
    """The model queues its work; the loss has to wait once, for matching's costs on the CPU."""
    torch.manual_seed(0)
    model, x = m2f.Mask2Former(3, **TOY).cuda(), torch.rand(2, 3, 64, 64, device="cuda")
    goal = [{"labels": torch.tensor([0, 2]).cuda(), "masks": torch.zeros(2, 64, 64, dtype=torch.bool).cuda()}] * 2
    model.loss(model(x), goal)[0].backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(model.loss(outputs, goal)[0])
