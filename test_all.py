"""The promises of every file, checked against something that this project did not write: closed forms, brute
force, slow loops, public implementations; resumed runs against undisturbed ones; every script end to end.

    pytest test_all.py  # minutes on two cores; no network, no GPU
    pip install diffusers transformers scipy accelerate  # and the comparisons marked `peer` run too
    SEGGEN_TEST_DATA=FOLDER pytest test_all.py -m real  # on samples of CamVid, COCO and ADE20K

Sections in the order of the files. Mistakes of users are tables: what is spoiled, the command, words of the message.
"""
import ast
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load, save, save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import diffusion
import imgsyn
import mask2former as m2f
import mask2img
import masksyn
import text2mask
import train as T
import unet as nets
from bench import camvid as bench_camvid, compare as C, masks
from data import pairs as P
from data.ade20k import prepare as ade
from data.camvid import prepare as camvid
from data.coco import export, prepare as coco
from data.pairs import CROWD, PairFolder, outline, palette
from data.shapes import prepare as shapes
from diffusion import Batches, EMA, PointDenoiser, Schedule, Spiral, denoiser, sample, seed_of, setup
from mask2img import Mask2Img
from text2mask import (CaptionedPairs, ResizeCrop, Text2Mask, TextToImage, clean, components, decode, encode,
                       grow, segments)

REPO = Path(P.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def skip_what_is_missing(request):
    """Markers that need something of the machine: see .pytest.ini."""
    for marker, here in (("gpu", torch.cuda.is_available()), ("real", "SEGGEN_TEST_DATA" in os.environ),
                         ("slow", "SEGGEN_SLOW" in os.environ)):
        if request.node.get_closest_marker(marker) and not here:
            pytest.skip(f"{marker}: not available here")

# ---- helpers of several sections ---------------------------------------------------------------------------

def pair_folder(root, names=("a", "b", "c"), instances=True):
    """Pairs of noise of 3 classes; image i is i pixels larger than 16 x 12."""
    P.write_json(root / "classes.json", [{"name": f"class{k}", "isthing": k == 2} for k in (1, 2, 3)])
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).integers(0, 256, (5, 16 + i, 12 + i), np.uint8)
        P.write_pair(root, name, noise[:3].T, noise[3].T % 4, noise[4].T if instances else None, [name], 3)
    return root


def spoil(path, content):
    """Remove (None), cut, change (old, new) or overwrite a file."""
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, tuple):
        path.write_text(path.read_text().replace(*content))
    else:
        path.write_bytes(path.read_bytes()[:-60] if content == "cut" else content.encode())


def call(module, *args):
    module.main([str(arg) for arg in args])


def mistake(module, *args):
    """The one line in which a script ends."""
    with pytest.raises(SystemExit, match="^.{5,}$") as stop:
        P.run(lambda: call(module, *args))
    return stop.value.code


def snapshot(folder):
    """{path: bytes} of every file, and no temporary one among them."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    assert not [path for path in paths if ".tmp" in path.name or "unfinished" in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- data/pairs.py -----------------------------------------------------------------------------------------

def test_pictures_of_any_mode_are_read(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6  # a phone's photo, to be turned clockwise
    for mode in ("1", "L", "LA", "P", "RGBA"):
        photo = noise.convert(mode)
        photo.save(path, exif=exif)
        assert (np.asarray(P.to_rgb(P.open_picture(path))) == np.rot90(photo.convert("RGB"), -1)).all()
    grey = np.arange(0, 65536, 997, np.uint16).reshape(6, 11)  # scaled, where PIL would clip it
    assert (np.asarray(P.to_rgb(Image.fromarray(grey))) == (grey >> 8)[..., None]).all()
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for values in (ids, ids.astype(np.uint16), ids > 5):
        Image.fromarray(values).save(path)
        assert (P.read_ids(path, 11, (3, 4)) == values).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 0.1)  # it would fill the memory
    with pytest.raises(ValueError, match="a.png: not a readable picture"):
        P.open_picture(path)


@pytest.mark.parametrize("path, content, words", [
    (".", None, "no such folder"), ("../.set.unfinished", "", "only a part of this set"),
    ("images/b.png", None, "images: b is missing"), ("masks/b.png", None, "masks: b is missing"),
    ("instances/b.png", None, "instances: b is missing"), ("images/b.jpg", "", "b.jpg and b.png have one na"),
    ("classes.json", None, "json: no such file"), ("classes.json", "{", "classes.json: not a JSON file"),
    ("classes.json", '{"sky": 1}', "json: not a list"), ("classes.json", "[[1]]", "json: not a list"),
    ("classes.json", '[{"name": null}]', "not a list"), ("classes.json", ("false", '"no"'), "not a list"),
    ("classes.json", json.dumps([{"name": "a"}] * 215), "215 classes"), ("classes.json", "[]", "0 classes"),
    ("images/b.png", "cut", "b.png: not a readable"), ("images/b.png", "text", "b.png: not a readable"),
    ("masks/b.png", Image.new("RGB", (17, 13)), "mode RGB"), ("masks/b.png", Image.new("L", (9, 8)), "9 x 8"),
    ("masks/b.png", Image.new("L", (17, 13), 4), "id 4"), ("instances/b.png", Image.new("L", (7, 7)), "7 x"),
    ("instances/b.png", Image.new("I;16", (17, 13), 256), "holds the id 256, where 0 to 255")])
def test_a_spoiled_pair_folder_is_refused_in_one_line(tmp_path, path, content, words):
    spoil(pair_folder(tmp_path / "set") / path, content)
    with pytest.raises(ValueError, match=f"^.*{words}.*$"):
        PairFolder(tmp_path / "set").keep()


def test_names_are_sorted_and_captions_are_lines_or_class_names(tmp_path, capsys):
    names = ["10", "9", "B", "a", "a-b", "a.b"]  # as file names, a-b.png comes before a.png
    root = pair_folder(tmp_path, names)
    for name, ending in zip(names, (".jpeg", ".jpg", ".jpeg", ".png", ".JPG", ".png")):
        (root / f"images/{name}.png").rename(root / f"images/{name}{ending}")
    (root / "images/.hidden.png").touch()
    (root / "captions/9.txt").write_text("\n  two trees \n\na house\n")
    (root / "captions/B.txt").unlink()
    Image.fromarray(np.uint8([[3, 3], [1, 0]])).save(root / "masks/B.png")
    pairs = PairFolder(root, start=1, limit=2)
    assert PairFolder(root).names == names and pairs.names == ["9", "B"]
    assert pairs.captions(0) == ["two trees", "a house"]
    assert pairs.captions(1) == pairs.captions(1) == ["a picture of class1, class3"]
    assert capsys.readouterr().out.count("composed from class names") == 1
    assert PairFolder(root, parts=("image",), start=2).captions(0) == [""]
    with pytest.raises(ValueError, match="no pairs are left after the first 6"):
        PairFolder(root, start=6)


@pytest.mark.parametrize("parts, instances, channels, method", [
    ("image ids instances", True, 5, "spawn"), ("image ids instances", False, 5, "fork"),
    ("ids image", True, 4, "fork"), ("ids instances", True, 2, "fork"), ("image", True, 3, "fork")])
def test_worker_processes_share_the_memory(tmp_path, monkeypatch, parts, instances, channels, method):
    pairs = PairFolder(pair_folder(tmp_path / "set", instances=instances), parts.split())
    decoded = [pairs.read(i) for i in range(3)]
    size = channels * sum((12 + i) * (16 + i) for i in range(3))
    with monkeypatch.context() as patch:
        patch.delattr(PairFolder, "decode")  # the headers alone say that it is too large
        pairs.keep(size - 1)
    assert pairs.memory is None
    pairs.keep(size)
    shutil.rmtree(tmp_path / "set")
    compare = map(np.testing.assert_equal, map(pairs.read, range(3)), decoded)  # runs in the worker
    for work, *args in ((list, compare), (operator.setitem, pairs.memory, 0, 7)):
        worker = multiprocessing.get_context(method).Process(target=work, args=args)
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    assert decoded[0][pairs.parts[0]].flat[0] != 7 == pairs.memory[0]  # shared, not copied


def test_the_fingerprint_changes_with_the_data(tmp_path):
    root, other = pair_folder(tmp_path / "set"), Image.new("L", (16, 12), 1)
    found = [PairFolder(root).fingerprint(), PairFolder(shutil.copytree(root, tmp_path / "b")).fingerprint()]
    for path, content in (("masks/a.png", other), ("instances/a.png", other), ("captions/a.txt", "other"),
                          ("captions/a.txt", None), ("images/a.png", "cut"), ("classes.json", ("ss1", "a")),
                          ("meta.json", "1"), ("meta.json", "of synthetic data"), ("masks/a.png", "any")):
        spoil(root / path, content)
        found.append(PairFolder(root).fingerprint())
    for path in root.glob("*/c.*"):
        path.rename(path.with_stem("d"))
    found.append(PairFolder(root).fingerprint())
    assert found[0] == found[1] and found[-2] == found[-3] and len(set(found)) == len(found) - 2


def test_a_pair_comes_back_and_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pair = {"image": np.stack([codes] * 3, -1), "ids": codes.clip(0, 214), "instances": codes}
    P.write_json(tmp_path / "classes.json", [{"name": str(k)} for k in range(214)])
    P.write_pair(tmp_path, "a", *pair.values(), ["one", "two"], 214)
    np.testing.assert_equal(PairFolder(tmp_path).read(0), pair)
    assert Image.open(tmp_path / "masks/a.png").getpalette() == palette(214).ravel().tolist()
    assert palette(150)[[1, 2, 6]].tolist() == [[0, 0, 51], [0, 0, 102], [51, 0, 0]]  # the published ones
    assert (tmp_path / "captions/a.txt").read_bytes() == b"one\ntwo\n"
    before = snapshot(tmp_path / "images")
    broken = mock.Mock(save=lambda path, kind: path.write_text("half") / 0)
    for name in ("a", "b"):  # an image that exists means a complete pair
        with pytest.raises(ZeroDivisionError):
            P.write_pair(tmp_path, name, broken, pair["ids"], codes, ["one"], 214)
        assert snapshot(tmp_path / "images") == before and snapshot(tmp_path)[f"masks/{name}.png"]
    monkeypatch.chdir(tmp_path)  # images are linked, or copied at worst
    for i, refused in enumerate(("symlink", "link", "nothing more")):
        P.write_pair(f"out{i}", "a", Path("images/a.png"))
        path = tmp_path / f"out{i}/images/a.png"
        assert path.read_bytes() == before["a.png"]
        assert path.is_symlink() == (i == 0) and path.samefile("images/a.png") == (i < 2)
        monkeypatch.setattr(os, refused, mock.Mock(side_effect=OSError), raising=False)


def test_jobs_run_in_order_and_their_errors_come_last():
    results = P.run_jobs(int, [*map(str, range(200)), "x", "7", "y"], processes=2)
    assert [next(results) for _ in range(201)] == [*range(200), 7]
    with pytest.raises(ValueError, match=r"'x' \(2 of 203 failed\)"):
        next(results)


@pytest.mark.parametrize("text", [
    '{"a": "twin beds", "b.jpg": ["x", "y"]}',
    '{"annotations": [{"image_id": "a", "id": 7, "caption": "twin beds"}, {"id": "b", "text": ["x", "y"]}]}',
    '[{"image": "p/a.jpg", "text": "twin\\nbeds"}, {"id": "b", "text": "x"}, {"id": "b", "text": ["y", ""]}]',
    '{"file_name": "a.jpg", "caption": "twin  beds"}\n\n{"b": ["x", "y"]}\n'])
def test_caption_files_in_any_usual_form(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    assert P.read_caption_file(path) == {"a": ["twin beds"], "b": ["x", "y"]}
    for content in (b"", b"[]", b"{}", b"[1, 2]", b'{"a": 3}', b"{", b'"text"', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="captions.json: not a file of captions"):
            P.read_caption_file(path)


def test_data_sets_are_found_and_missing_shapes_prepared(tmp_path, monkeypatch):
    def prepare(command):
        for split in ("train", "val", "unlabelled"):
            (root / split).mkdir(exist_ok=True)
            P.unfinished(root / split).unlink(missing_ok=True)
        return mock.Mock(returncode=0)
    root, run = tmp_path / "data/shapes", mock.Mock(side_effect=prepare)
    monkeypatch.setattr(P, "ROOT", tmp_path)
    monkeypatch.setattr(P.subprocess, "run", run)
    other = pair_folder(tmp_path / "data/other/train")
    assert P.find_split("other", "train") == P.find_split(other.parent, "train") == other
    for split, mark, runs in (("unlabelled", "no", 1), ("train", "val", 1), ("val", "no", 2)):
        P.write_text(P.unfinished(root / mark), "")
        assert P.find_split("shapes", split) == root / split and run.call_count == runs
    assert [each.args[0][2:] for each in run.call_args_list] == [["--unlabelled", "8000"], []]
    shutil.rmtree(root / "train")
    run.side_effect = None  # what it returns is no exit status of 0
    P.write_text(tmp_path / "data/raw/prepare.py", "")
    for name, split, words in (("shapes", "train", "could not be made"), ("no", "val", "no data set"),
                               ("raw", "a", "data/raw/prepare.py"), ("other", "a", "there are: train$")):
        with pytest.raises(ValueError, match=words):
            P.find_split(name, split)
    monkeypatch.setenv("RANK", "1")  # the first rank prepares them, this one waits
    monkeypatch.setattr(P.time, "sleep", lambda seconds: (root / "train").mkdir())
    assert P.find_split("shapes", "train") == root / "train"


def test_a_contact_sheet_shows_all_colours_and_captions():
    grey, classes = [np.full((64, 64, 3), 200, np.uint8)] * 3, [{"name": f"class {k}"} for k in range(13)]
    sheet, longer = (P.contact_sheet(dict(a=grey, b=grey), ["a word " * n] * 3, classes) for n in (6, 18))
    assert (np.asarray(sheet).reshape(-1, 1, 3) == palette(13)[1:14]).all(2).any(0).all()
    assert longer.height > sheet.height > 4 * 64  # enlarged ...
    assert P.contact_sheet({"": [np.zeros((512, 512, 3), np.uint8)]}).width < 300  # ... or shrunk


def test_a_script_ends_in_one_line_or_a_traceback_for_developers(monkeypatch, capsys):
    assert mistake(mock.Mock(**{"main.side_effect": ValueError})) == "ValueError()"
    with pytest.raises(SystemExit, match="130"):
        P.run(mock.Mock(side_effect=KeyboardInterrupt))
    assert capsys.readouterr().err.startswith("Stopped.")
    monkeypatch.setenv("SEGGEN_DEBUG", "1")
    with pytest.raises(OSError):
        P.run(mock.Mock(side_effect=OSError))


# ---- unet.py -----------------------------------------------------------------------------------------------

SMALL = dict(block_out_channels=(32, 64, 96), transformer_layers_per_block=(1, 2, 3), norm_num_groups=8,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             attention_head_dim=(2, 4, 6), cross_attention_dim=32, addition_time_embed_dim=8,
             projection_class_embeddings_input_dim=16 + 6 * 8)
NARROW = dict(block_out_channels=(16, 32), attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2),
              down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1)
SDXL_NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                  timestep_spacing="leading", steps_offset=1, prediction_type="epsilon")
CAPTIONS = [
    "A woman's cat, that's 12 years old, isn't on the red and white mat!!", "a long caption " * 40, "x" * 300,
    "they're we've I'm he'll you'd don't 'tis ''s 'S", "3.14159 \u00bd \u00b2 \u2167 \u0663", "", "   ",
    "a   tab\tand\nnew line\u00a0no break \u3000wide \u2028 line \x1c \x85 next \u0939\u093f\u0928\u094d ...",
    "na\u00efve \u00dcber \u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 caf\u00e9 cafe\u0301",
    "\u00df \u1e9e \ufb01 \u1e9b\u0323 \uac00 \u1100\u1161 \u212b \u2126 \u05d7\u05ea\u05d5 \u4e00\u53ea",
    "\U0001f642\U0001f469\u200d\U0001f4bb flag \U0001f1e9\U0001f1ea \u2764\ufe0f emoji\U0001f600text",
    "zero\u200bwidth soft\u00adhyphen \x00 nul \x7f del \ue000 private \u0441\u043e\u0431\u0430\u043a\u0430",
    "under_score a-b c/d #tag @you 100% $5 <b> a<|endoftext|>b <|startoftext|> <|ENDOFTEXT|>"]
SHARED = ("_class_name act_fn addition_embed_type flip_sin_to_cos freq_shift norm_eps resnet_time_scale_shift"
          " use_linear_projection")


def error(ours, theirs):
    """Largest difference, relative to the scale of what is right."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def noisy(net, seed=0):
    """The network with random weights of a trained one's scale: zeros would hide what is behind them."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        gain = p.ndim == 1 and "norm" in name and name.endswith("weight")
        nn.init.normal_(p, mean=float(gain), std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return net.eval()


def write_tokenizer(folder):
    """A small vocabulary in CLIP's format, with merges that join the words of CAPTIONS in a random order."""
    merges, rng = {}, random.Random(0)
    for word in " ".join(CAPTIONS).lower().split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1 and word.isascii() and word.isalpha():
            i = rng.randrange(len(parts) - 1)
            merges[tuple(parts[i:i + 2])] = parts[i:i + 2] = ["".join(parts[i:i + 2])]
    single = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]
    tokens = [*single, *(c + "</w>" for c in single), *map("".join, merges), nets.START, nets.END]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": nets.END, "model_max_length": 77}))
    return str(folder)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A small SDXL with random weights, written by the public pipeline: base/; half/ as fp16 in shards."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("sdxl")
    words = write_tokenizer(out / "words")
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(words, pad_token=pad) for pad in (nets.END, "!")]
    shape = dict(vocab_size=len(tokenizers[0]), hidden_size=16, intermediate_size=32, projection_dim=16,
                 num_hidden_layers=2, num_attention_heads=2, eos_token_id=2, bos_token_id=0)
    kinds = (transformers.CLIPTextModel, "quick_gelu"), (transformers.CLIPTextModelWithProjection, "gelu")
    text = [noisy(cls(transformers.CLIPTextConfig(hidden_act=act, **shape))) for cls, act in kinds]
    unet = noisy(diffusers.UNet2DConditionModel(
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", **SMALL | NARROW))
    vae = noisy(diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025))
    noise = diffusers.EulerDiscreteScheduler(**SDXL_NOISE)
    pipe = diffusers.StableDiffusionXLPipeline(vae, *text, *tokenizers, unet, noise, add_watermarker=False)
    pipe.save_pretrained(out / "base")
    pipe.to(torch.float16).save_pretrained(out / "half", variant="fp16", max_shard_size="200KB")
    return out


@pytest.fixture
def full_fp32(monkeypatch):
    """No TF32 on CUDA, which keeps 10 bits of a factor's 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def unet_pairs(sdxl, folder):
    """UNet and ControlNet, written by us and read by the public library; the UNet's gradients, recomputed."""
    import diffusers
    theirs, unet = [], noisy(nets.UNet(**SMALL))
    control = noisy(nets.ControlNet.from_unet(unet), seed=3)
    for net, cls in (unet, diffusers.UNet2DConditionModel), (control, diffusers.ControlNetModel):
        (folder / "config.json").write_text(json.dumps(net.public_config()))
        save_file(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        theirs.append(cls.from_pretrained(folder, low_cpu_mem_usage=False).double())
    unet, control = unet.double().enable_checkpointing(), control.double()
    t, context, pooled = torch.tensor([7, 801.5]), torch.randn(2, 5, 32).double(), torch.randn(2, 16).double()
    time_ids = torch.tensor([[512, 640, 0, 16, 768, 769], [300, 200, 5, 1, 1024, 513]])
    public = dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=time_ids), return_dict=False)
    for height, width, scale in (8, 12, 1.0), (10, 6, 0.3), (9, 7, 1.0):  # two have an odd grid inside
        x, cond = torch.randn(2, 4, height, width).double(), torch.rand(2, 3, 8 * height, 8 * width).double()
        residuals = control(x, t, context, pooled, time_ids, cond, scale)
        down, middle = theirs[1](x, t, context, cond, scale, **public)
        yield from zip([*residuals[0], residuals[1]], [*down, middle], strict=True)
        added = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        right = theirs[0](x, t, context, **added, **public)[0]
        yield unet(x, t, context, pooled, time_ids, residuals), right
    output, right = unet(x, t, context, pooled, time_ids), theirs[0](x, t, context, **public)[0]
    (output.square().sum() + right.square().sum()).backward()
    parameters = dict(theirs[0].named_parameters())
    yield from ((p.grad, parameters[name].grad) for name, p in unet.named_parameters())


def folder_pairs(sdxl, folder):
    """The parts of a folder of SDXL, in fp16 and in shards, as the public pipeline runs them."""
    import diffusers
    half = sdxl / "half"
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(half, variant="fp16").to(torch.float64)
    unet, vae = (nets.read_part(cls, half / name, dtype=torch.float64)
                 for cls, name in ((nets.UNet, "unet"), (nets.VAE, "vae")))
    text = nets.SDXLText.from_folder(half, dtype=torch.float64)
    assert len(nets.weight_files(half / "unet")) > 1 and not unet.training
    yield from ((p, pipe.unet.state_dict()[name]) for name, p in unet.state_dict().items())
    x, z = torch.randn(3, 3, 64, 48).double(), torch.randn(3, 4, 8, 6).double()
    right = pipe.vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0)) * 0.13025
    torch.manual_seed(0)
    yield vae.encode(x, slices=2), right
    yield vae.decode(z * 0.13025, slices=2), pipe.vae.decode(z).sample
    captions = ["a woman's cat", "a<|endoftext|>b", "the red mat " * 40, ""]
    tokens = text.tokenize(captions)
    context, pooled = text(tokens)
    right, zeros, right_pooled, zeros_pooled = pipe.encode_prompt(captions[:3])
    yield from ((context[:3], right), (pooled[:3], right_pooled))
    assert torch.equal(context[3:], zeros[:1]) and torch.equal(pooled[3:], zeros_pooled[:1])
    assert not tokens[3].any() and not any(p.requires_grad for p in text.parameters())
    first, second = text.text_encoder, text.text_encoder_2
    first.load_state_dict(first.state_dict() | {"text_model.embeddings.position_ids": tokens})  # in old files
    yield first(tokens[:, 0])[1], pipe.text_encoder(tokens[:, 0]).pooler_output
    second.config["eos_token_id"] = 0  # only 2 stands for the largest id
    right = pipe.text_encoder_2.from_pretrained(half / "text_encoder_2", variant="fp16", eos_token_id=0)
    yield second(tokens[:3, 1])[1], right.double()(tokens[:3, 1]).text_embeds


def token_pairs(sdxl, folder):
    """Tokens of both layouts and both paddings; SEGGEN_TEST_DATA has captions that people wrote."""
    import transformers
    rng = random.Random(0)
    captions = CAPTIONS + ["".join(rng.choices("".join(CAPTIONS), k=30)) for _ in range(300)]
    if data := os.environ.get("SEGGEN_TEST_DATA"):
        real = json.loads(Path(data, "coco/annotations/captions_val2017.json").read_text())["annotations"]
        captions += [annotation["caption"] for annotation in real]
    for name in ("words", "base/tokenizer", "base/tokenizer_2"):
        theirs = transformers.CLIPTokenizer.from_pretrained(sdxl / name)
        right = theirs(captions, padding="max_length", max_length=77, truncation=True)["input_ids"]
        yield nets.CLIPTokenizer(sdxl / name)(captions), torch.tensor(right)


@pytest.mark.peer
@pytest.mark.parametrize("pairs", [unet_pairs, folder_pairs, token_pairs])
def test_networks_equal_the_public_ones(sdxl, tmp_path, pairs):
    for ours, theirs in pairs(sdxl, tmp_path):
        assert error(ours, theirs) < 1e-9  # in fp64: only rounding keeps them apart


def test_the_defaults_are_those_of_sdxl(capsys):
    nets.main()
    printed = capsys.readouterr().out
    for words in ("context (1, 77, 2048)", "prediction (1, 3, 64, 64)", "prediction (1, 4, 96, 96)",
                  "2567.46M", "1251.01M", "83.65M", "123.06M", "694.66M"):  # as published
        assert words in printed
    with torch.device("meta"):
        sets = nets.build("sdxl")
    configs = [net.config for net in (sets["unet"], sets["vae"], *sets["text"].children())]
    keys = "norm_num_groups attention_head_dim num_attention_heads hidden_act scaling_factor".split()
    assert [[config[key] for key in keys if key in config] for config in configs] == [
        [32, (5, 10, 20)], [32, 0.13025], [12, "quick_gelu"], [20, "gelu"]]  # no number shows these


def tiny():
    """UNet, ControlNet, TextEncoder of the tiny preset with noise in all weights but the ControlNet's own."""
    torch.manual_seed(0)
    preset = nets.PRESETS["tiny"]
    unet, text = noisy(nets.UNet(**preset["unet"])), nets.TextEncoder(**preset["text"]).eval()
    return unet, nets.ControlNet.from_unet(unet, **preset["controlnet"]).eval(), text


def tiny_inputs(text, captions):
    """x, t, context, pooled, time_ids of the tiny UNet."""
    torch.manual_seed(1)
    context, pooled = (part.detach() for part in text(text.tokenize(captions)))
    x, t = torch.randn(len(captions), 3, 64, 64), torch.linspace(10, 900, len(captions))
    return x, t, context, pooled, torch.tensor([[64, 64, 0, 0, 64, 64]] * len(captions))


def test_a_controlnet_adds_nothing_until_trained_and_learns_from_the_first_step():
    unet, control, text = tiny()
    data, cond = tiny_inputs(text, ["a red ball", "two cats"]), torch.rand(2, 3, 64, 64)
    start = control.state_dict()
    assert all(torch.equal(p, start[name]) for name, p in unet.state_dict().items() if name in start)
    plain, output = unet(*data), unet(*data, control(*data, cond))
    assert torch.equal(output, plain)
    output.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in unet.parameters())  # nothing in it is without effect
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_head[-1]):
        assert conv.weight.abs().max() == 0 and conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_batched_equals_single_and_every_input_matters(full_fp32, device):
    unet, control, text = tiny()
    captions = ["a red ball", "", "a longer one, with \u00fcml\u00e4uts " * 9]
    data = [*tiny_inputs(text, captions), torch.rand(3, 3, 64, 64)]
    batched = unet(*data[:5], noisy(control)(*data))
    for i, part in enumerate(data):
        other = list(data)
        other[i] = part * 2 if i == 4 else part.roll(1, 0)  # time_ids are the same in all samples
        assert error(unet(*other[:5], control(*other)), batched) > 1e-4
    copies = [type(net)(**json.loads(json.dumps(net.config))).eval() for net in (unet, control, text)]
    for net, right in zip(copies, (unet, control, text)):
        net.load_state_dict(right.state_dict())  # as from a checkpoint
    unet, control = copies[0].to(device), copies[1].to(device)
    for i in range(3):
        one = [part[i:i + 1].to(device) for part in (*tiny_inputs(copies[2], captions), data[5])]
        assert error(unet(*one[:5], control(*one)).cpu(), batched[i:i + 1]) < 1e-4
        with torch.autocast(device, torch.bfloat16):
            assert 0 < error(unet(*one[:5], control(*one)).float().cpu(), batched[i:i + 1]) < 0.05


def test_text_encoder_separates_words_and_an_empty_caption_is_the_null_condition():
    text = nets.TextEncoder(length=12).eval()
    tokens = text.tokenize(["a cat,", "\u00e9t\u00e9 " * 50, "", "A CAT ,", "a car,"])
    assert tokens.shape == (5, 12) and (tokens > 0).sum(1).tolist() == [3, 12, 0, 3, 3]
    context, pooled = text(tokens)
    assert (context[0, :3] != 0).all() and not (context[0, 3:].any() or context[2].any() or pooled[2].any())
    assert torch.equal(tokens[3], tokens[0]) and not torch.allclose(pooled[4], pooled[0])
    words = {"".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(2000)}
    rows = {(n % 1024, n // 1024 % 1024) for n in text.tokenize(words)[:, 0].tolist()}
    assert len(rows) == len(words)  # no two words share both rows


def test_checkpointing_runs_blocks_again_in_backward():
    unet, _, text = tiny()
    data, calls = tiny_inputs(text, ["a red ball"]), []
    for name in ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1"):
        unet.get_submodule(name).register_forward_pre_hook(lambda part, _: calls.append(part))
    unet.enable_checkpointing()(*data).square().mean().backward()
    assert len(calls) == 4  # unet_pairs compares the gradients
    average = copy.deepcopy(unet)  # as EMA does: with weights of its own
    average.mid_block.resnets[0].conv1.weight.data.zero_()
    assert error(average(*data), unet(*data)) > 1e-4


def test_a_unet_without_text():
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([7, 801])
    none = dict(projection_class_embeddings_input_dim=None)
    bare = noisy(nets.UNet(**SMALL | none | dict(cross_attention_dim=None)))
    residuals = noisy(nets.ControlNet.from_unet(bare))(x, t, cond=torch.rand(2, 3, 128, 128))
    for other in bare(x, t.flip(0)), bare(x, t, residuals=residuals):
        assert error(other, bare(x, t)) > 1e-3
    unet, label = noisy(nets.UNet(**nets.PRESETS["tiny"]["unet"] | none)), nn.Embedding(10, 96)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    prediction = unet(x, t, label(y)[:, None])  # of ten classes, as in the module's docstring
    assert error(unet(x, t, label(y.flip(0))[:, None]), prediction) > 1e-4
    prediction.square().mean().backward()
    assert label.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 7]


def spoil_folder(folder, path, change):
    """Remove a file or a folder (None), set keys of a JSON file (a dict), or change bytes (a function)."""
    path = folder / path
    if change is None:
        path.rename(folder.parent / "removed")
    elif callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.peer
@pytest.mark.parametrize("path, change, words", [
    *[(part, None, f"{part}: no such folder") for part in
      "unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()],
    ("model_index.json", None, "model_index.json"),
    ("model_index.json", dict(_class_name="StableDiffusionXLInpaintPipeline"), "a StableDiffusionXLInpaint"),
    ("unet/config.json", lambda raw: b"", "unet/config.json: not a JSON file"),
    ("unet/config.json", dict(in_channels=9), "in_channels is 9"),
    ("unet/config.json", dict(act_fn="gelu"), "unet/config.json: act_fn is gelu"),
    ("unet/config.json", dict(down_block_types=["Attn"], up_block_types=["Attn"]), "['Attn']: use Down"),
    ("text_encoder/config.json", dict(hidden_act="relu"), "hidden_act 'relu'"),
    ("text_encoder/model.safetensors", None, "text_encoder: no weights"),
    ("text_encoder/model.safetensors", lambda raw: raw[:-1000], "text_encoder/model.safetensors: "),
    ("text_encoder/model.safetensors", lambda raw: save({}), "text_encoder: not the weights of this CLIP"),
    ("text_encoder/model.safetensors", lambda raw: save(load(raw) | {"lora.up": torch.ones(1)}), "lora.up"),
    ("tokenizer_2/tokenizer.json", None, "tokenizer_2/tokenizer.json"),
    ("tokenizer_2/tokenizer_config.json", dict(pad_token="<pad>"), "<pad> in its vocabulary"),
])
def test_a_wrong_sdxl_folder_is_refused_in_one_line(sdxl, tmp_path, path, change, words):
    folder = shutil.copytree(sdxl / "base", tmp_path / "base")
    spoil_folder(folder, path, change)
    assert nets.is_sdxl(folder) and not nets.is_sdxl(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        nets.check_sdxl(folder)
        nets.read_part(nets.UNet, folder / "unet")
        nets.read_part(nets.VAE, folder / "vae")
        nets.SDXLText.from_folder(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("cls, keys", [
    (nets.UNet, f"{SHARED} time_embedding_type up_block_types"), (nets.ControlNet, SHARED),
    (nets.VAE, "_class_name act_fn"), (nets.CLIPText, "model_type")])
def test_a_configuration_of_another_kind_is_refused(cls, keys):
    with torch.device("meta"):
        config = cls().config
    good = nets.required_values(cls, config) | config
    for key in keys.split():
        with pytest.raises(ValueError, match=f"here: {key} is other"):
            cls.from_config(good | {key: "other"}, where="here")
    for key in good.keys() - nets.OWN_ARGUMENTS:
        with pytest.raises(ValueError, match=f"here: {key} is missing"):
            cls.from_config({name: value for name, value in good.items() if name != key}, where="here")


# A server that has imported everything starts the processes: to kill one, or to start two ranks, costs no seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "masksyn", "imgsyn", "train"])


def run_rank(rank, ranks, port, function, arguments):
    """What torchrun does for a rank. One thread: another split of a sum over threads changes its last bits."""
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*arguments)


def start(function, *arguments, ranks=1):
    """function(*arguments) in a process of its own, or in one for each rank -> the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=run_rank, args=(n, ranks, port, function, arguments)) for n in range(ranks)]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


# ---- diffusion.py: the process and its samplers ------------------------------------------------------------

@pytest.mark.parametrize("kind", ["cosine", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_targets_and_to_x0_agree_and_losses_count_as_those_of_x0(kind, prediction):
    """2303.09556: an error of the prediction counts as min(SNR, 5) times the error of x0 that it causes."""
    schedule, t = Schedule(kind, prediction), torch.tensor([10, 200, 400, 600, 900])
    x0, noise, mistake = torch.randn(3, 5, 48)
    x, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    for i, sigma in enumerate(schedule.sigmas[t].tolist()):
        assert torch.allclose(schedule.to_x0(target, x, sigma)[i], x0[i], atol=2e-3)
        error = (schedule.to_x0(target + mistake, x, sigma) - x0)[i].square().mean().item()
        share = min(sigma ** -2 + (prediction == "sample"), 5)  # that of x0 keeps a weight of 1 in pure noise
        ours = schedule.weight(t, 5.0)[i] * mistake[i].square().mean()
        assert ours.item() == pytest.approx(share * error, rel=1e-2)


def test_a_schedule_stays_on_the_cpu():
    schedule = Schedule()
    assert all(schedule.time_step(sigma) == i for i, sigma in enumerate(schedule.sigmas.tolist()))
    before = schedule.noise_levels(10, "euler")
    schedule.a, schedule.s = schedule.a.to("meta"), schedule.s.to("meta")  # training moves them to its device
    assert schedule.noise_levels(10, "euler") == before


@pytest.mark.parametrize("change, words", [
    (dict(beta_start=0.1), "beta_start is 0.1"), (dict(beta_start=None), "beta_start is None"),
    (dict(num_train_timesteps=500), "num_train_timesteps is 500"), (dict(prediction_type="flow"), "'flow'"),
    (dict(timestep_spacing="no"), "'no'"), (dict(rescale_betas_zero_snr=True), "zero-SNR"),
    (dict(use_karras_sigmas=True), "Karras"), (None, "scheduler.json: not a JSON file")])
def test_a_public_scheduler_of_another_kind_is_refused(tmp_path, change, words):
    path = tmp_path / "scheduler.json"
    path.write_text(json.dumps(SDXL_NOISE | change) if change else "{")
    with pytest.raises(ValueError, match=words):
        Schedule.from_public(path)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++", "edm"])
def test_samplers_reach_a_gaussian_exactly(sampler):
    """Data of N(m, s^2) has the closed-form denoiser (s^2 x + sigma^2 m) / (s^2 + sigma^2)."""
    m, s = 0.3, 0.5
    torch.manual_seed(0)
    out = sample(lambda x, sigma: (s ** 2 * x + sigma ** 2 * m) / (s ** 2 + sigma ** 2),
                 Schedule("cosine", "sample", "trailing"), torch.randn(20000, 1), 100, sampler)
    assert abs(out.mean() - m) < 0.02 and abs(out.std() - s) < 0.02


@pytest.mark.parametrize("steps", [25, 200])
def test_edm_stays_within_the_noise_of_training(steps):
    schedule, sigmas = Schedule(), []
    sample(lambda x, sigma: sigmas.append(sigma) or x / (1 + sigma ** 2), schedule, torch.randn(1, 2), steps, "edm")
    assert max(sigmas) <= schedule.sigmas[-1].item() * (1 + 1e-6) and len(sigmas) == 2 * steps - 1


@pytest.mark.peer
@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("sampler, name", [
    ("euler", "EulerDiscrete"), ("ddim", "DDIM"), ("dpm++", "DPMSolverMultistep")])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_public_schedulers_walk_the_same_way(sampler, name, steps, spacing, tmp_path):
    """With any network: the same steps, inputs and end."""
    diffusers = pytest.importorskip("diffusers")
    config = SDXL_NOISE | dict(timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    schedule = Schedule.from_public(tmp_path / "config.json")
    peer = getattr(diffusers, f"{name}Scheduler").from_config(config)
    peer.set_timesteps(steps)
    torch.manual_seed(0)
    noise, mix, seen = torch.randn(2, 4, 8, 8), torch.randn(4, 4) / 3, []

    def net(x, t):
        seen.append(x)
        return torch.einsum("bchw,dc->bdhw", x, mix) * math.cos(float(t) / 300)
    x = noise * peer.init_noise_sigma
    for t in peer.timesteps:
        x = peer.step(net(peer.scale_model_input(x, t), t), t, x).prev_sample
    ours = sample(denoiser(lambda x, t: net(x, t[0]), schedule, ()), schedule, noise, steps, sampler)
    assert schedule.visited_steps(steps, sampler).tolist() == peer.timesteps.tolist() and len(seen) == 2 * steps
    for a, b in zip([ours, *seen[steps:]], [x, *seen[:steps]]):
        assert (a - b).abs().max() / b.abs().max() < 1e-5


def test_guidance_in_one_batch_equals_two_calls():
    schedule, net = Schedule("cosine", "sample"), PointDenoiser(16)
    x, arm, null = torch.randn(5, 2), torch.zeros(5, 1, dtype=torch.long), torch.full((5, 1), 2)
    both = denoiser(net, schedule, (arm,), (null,), 3.0)(x, 1.5)
    cond, uncond = (denoiser(net, schedule, (c,))(x, 1.5) for c in (arm, null))
    assert torch.allclose(both, uncond + 3 * (cond - uncond), atol=1e-5)
    high = denoiser(net, schedule, (arm,), (null,), 3.0, guide_above=1.0)  # unguided from sigma 1 down
    assert torch.equal(high(x, 1.5), both)
    assert torch.equal(high(x, 1.0), denoiser(net, schedule, (arm,))(x, 1.0))


@pytest.mark.parametrize("spacing, sampler, steps", [
    ("trailing", "dpm++", 1001), ("leading", "dpm++", 1000), ("linspace", "euler", 1200), ("leading", "edm", 10 ** 20)])
def test_too_many_sampling_steps_are_refused(spacing, sampler, steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps: .* Use fewer"):
        Schedule(spacing=spacing).noise_levels(steps, sampler)
    assert len(Schedule(spacing="trailing").noise_levels(1000, "dpm++")) == 1001


# ---- diffusion.py: training --------------------------------------------------------------------------------

def test_the_average_is_lent_and_given_back():
    net = PointDenoiser(8)
    net.outer.requires_grad_(False)  # frozen parameters have no average
    first = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    average, trained = EMA(net, 0.5), [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.data += 1
    for _ in range(2):
        with average.applied_to_model():
            assert all(torch.equal(p, a) for p, a in zip(trained, first, strict=True))
        assert all(torch.equal(p, a + 1) for p, a in zip(trained, first))
    average.update()
    average.update()
    left = 2 / 11 * 3 / 12  # of the way: decays (1 + n) / (10 + n)
    assert all(torch.allclose(a, b + 1 - left, atol=1e-5) for a, b in zip(average.shadow.values(), first, strict=True))


def toy(out, steps=12, event=None, at=0, width=16, dataset=None, **options):
    """A small training -> its batches. At call `at` of the loss comes "stop", "nan loss" or "nan gradient"."""
    torch.manual_seed(0)
    model, schedule, batches = PointDenoiser(width), Schedule("cosine", "v_prediction"), []

    def loss(net, batch):
        batches.append(batch)
        error = diffusion.loss(net, schedule, *batch)
        if len(batches) != at:
            return error
        if event == "stop":
            raise KeyboardInterrupt
        if event == "nan loss":
            return error * math.nan
        return error + (net.arm.weight * 0).sqrt().sum()  # adds 0, with a gradient of NaN
    defaults = dict(steps=steps, batch=8, lr=1e-3, device="cpu", save_every=4, report_every=2)
    diffusion.fit(model, loss, dataset or Spiral(), out, **defaults | options)
    return batches


def steps_in_log(out):
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


class Noisy(Dataset):
    """Random items, as augmentation makes them."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.rand(2) + index, torch.randint(2, (1,))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dataset", [Spiral(), Noisy()])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, accumulate, dataset):
    options = dict(dataset=dataset, accumulate=accumulate)
    toy(tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "b", event="stop", at=7 * accumulate, **options)
    (tmp_path / "b" / "log.jsonl").write_text("its lines are in state.pt too")
    toy(tmp_path / "b", **options)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert steps_in_log(tmp_path / "a") == steps_in_log(tmp_path / "b") == [2, 4, 6, 8, 10, 12]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a complete run."""
    out = tmp_path_factory.mktemp("run") / "toy"
    toy(out, settings=dict(data="a"))
    return out


@pytest.mark.parametrize("change, words", [
    (dict(steps=8), "steps 12 then, 8 now"), (dict(lr=2e-3), "lr 0.001 then, 0.002 now"), (dict(seed=1), "seed 0 then"),
    (dict(batch=4), "batch 8 then"), (dict(accumulate=2), "accumulate 1 then"), (dict(width=8), "config .*16.* then"),
    (dict(settings=dict(data="b")), "data a then, b now"),
    (dict(settings=dict(data="a", init="x")), "init None then, x now")])
def test_other_settings_do_not_resume(finished, change, words):
    before = (finished / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=words):
        toy(finished, **dict(settings=dict(data="a")) | change)
    assert not toy(finished, settings=dict(data="a"))  # the same: no batch is left to do
    assert (finished / "state.pt").read_bytes() == before


class Boom:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("content", ["pickle", "zip", "cut", "empty"])
def test_a_state_that_is_none_is_refused_and_never_executed(finished, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save({"settings": Boom()}, "zip")
    contents = dict(pickle=pickle.dumps(Boom()), zip=(tmp_path / "zip").read_bytes(), empty=b"",
                    cut=(finished / "state.pt").read_bytes()[:-500])
    (tmp_path / "state.pt").write_bytes(contents[content])
    with pytest.raises(ValueError, match="state.pt: not a state to resume") as error:
        toy(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("event, step, saved", [
    ("nan loss", 7, True), ("nan gradient", 8, True), ("nan gradient", 4, False)])  # steps 4 and 8 save
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, event, step, saved):
    words = "The last good state is kept" if saved else "Nothing was saved yet"
    with pytest.raises(ValueError, match=f"not finite at step {step}. {words}"):
        toy(tmp_path, event=event, at=step)
    assert (tmp_path / "state.pt").exists() == (tmp_path / "model.safetensors").exists() == saved
    if saved:
        diffusion.read_checkpoint(tmp_path, "PointDenoiser")  # raises if a weight is not finite
        assert len(toy(tmp_path)) == 8  # it goes on from step 4


@pytest.mark.parametrize("room, files", [
    (0, []), (4000, ["log.jsonl"]), (12000, ["log.jsonl", "model.safetensors"])])
def test_a_full_disk_ends_in_one_line(tmp_path, capsys, room, files):
    """RLIMIT_FSIZE stands in for it: no file may grow over `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(SystemExit, match="too large") as end:
            diffusion.run(lambda: toy(tmp_path / "out", 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files  # no half of one
    assert "\n" not in end.value.code


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        toy(tmp_path, 4, picture=lambda model, path: path.touch(), measure=lambda model: dict(points=3))
    finally:
        os.umask(before)
    names = ["log.jsonl", "model.safetensors", "samples.png", "state.pt"]
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(names, 0o640)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["points"] == 3


@pytest.mark.parametrize("dataset", [
    Spiral(), Noisy(), TensorDataset(torch.randn(100, 2), torch.arange(100)[:, None] % 2)])
def test_any_dataset_gives_the_same_items_for_any_number_of_workers(tmp_path, dataset):
    runs = [toy(tmp_path / str(workers), 4, dataset=dataset, workers=workers) for workers in (0, 1)]
    for ours, theirs in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    points, arm = (torch.cat(part) for part in zip(*runs[0]))
    assert points.shape == (32, 2) and arm.shape == (32, 1) and len(points.unique(dim=0)) > 20


def test_batches_of_text_reach_the_loss_as_they_are(tmp_path):
    def loss(net, batch):
        assert tuple(batch[1]) == ("a caption", "a caption")
        return net.outer.bias.sum()
    pairs = [(torch.ones(2), "a caption")] * 10
    diffusion.fit(PointDenoiser(4), loss, pairs, tmp_path, steps=1, batch=2, lr=1e-3, device="cpu")


def test_micro_batches_add_up_to_one_batch():
    def loss(net, x):
        return net(x).square().mean()
    net, x = nn.Linear(3, 2), torch.randn(8, 3)
    error = diffusion.accumulate_gradients(net, loss, x.split(2), torch.device("cpu"))
    assert torch.allclose(error, loss(net, x))
    for p, right in zip(net.parameters(), torch.autograd.grad(loss(net, x), net.parameters())):
        assert torch.allclose(p.grad, right, atol=1e-6)


def test_two_ranks_step_by_the_mean_of_their_gradients(tmp_path):
    """Beside a loop without ranks, which takes the mean itself."""
    finish(start(toy, tmp_path, 4, ranks=2))
    torch.manual_seed(0)
    net, schedule, spiral = PointDenoiser(16), Schedule("cosine", "v_prediction"), Spiral()
    optimiser = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    batches = [list(Batches(len(spiral), 8, 1, 0, 4, 0, rank)) for rank in range(2)]
    for step in range(4):
        optimiser.zero_grad()
        for rank in range(2):
            points, arm = torch.utils.data.default_collate([spiral[key] for key in batches[rank][step]])
            torch.manual_seed(seed_of(0, step, rank, "noise"))
            (diffusion.loss(net, schedule, points, arm) / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = 1e-3 * (step + 1) / 100 * (1 + math.cos(math.pi * step / 4)) / 2
        optimiser.step()
    params = torch.load(tmp_path / "state.pt", weights_only=True)["average"]["params"]
    assert all(torch.allclose(p, params[name], atol=1e-7) for name, p in net.named_parameters())
    assert steps_in_log(tmp_path) == [2, 4]  # rank 0 alone writes


# ---- diffusion.py: devices, checkpoints, the demo ----------------------------------------------------------

def test_each_rank_takes_its_gpu_before_it_joins(monkeypatch):
    for device in ("foo", "cuda:", "cpu:1", "cuda:x"):
        with pytest.raises(ValueError, match=f"device {device}: not a device"):
            setup(device)
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: calls.append(backend))
    for name, value in dict(RANK="7", LOCAL_RANK="3", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    assert setup() == (torch.device("cuda:3"), 7, 8) and calls == ["cuda:3", "nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:3: CUDA sees 2 GPUs"):
        setup()


def test_a_checkpoint_comes_back_and_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = PointDenoiser(8)
    diffusion.save(model, "good")
    again = diffusion.load(PointDenoiser, "good")
    assert not again.training and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    model.outer.bias.data[0] = math.nan
    diffusion.save(model, "nan")
    assert len(diffusion.weights_hash("good")) == 12 and diffusion.weights_hash("nan") != diffusion.weights_hash("good")
    content = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-20])
    (tmp_path / "pickle").write_bytes(pickle.dumps(Boom()))
    (tmp_path / "newer").write_bytes(content.replace(b"seggen-1", b"seggen-9"))
    for path, words in dict(cut="cut short", pickle="never a pickle", newer="of format seggen-9", nan="not finite",
                            missing="no such file").items():
        with pytest.raises(ValueError, match=f"^{path}.*: .*{words}"):
            diffusion.load(PointDenoiser, path)
    with pytest.raises(ValueError, match="holds a PointDenoiser .*, not a Text2Mask"):
        diffusion.read_checkpoint("good", "Text2Mask")
    with pytest.raises(ValueError, match="good: not the weights of this PointDenoiser .*size mismatch"):
        diffusion.load_strict(PointDenoiser(16), diffusion.read_checkpoint("good", "PointDenoiser")[1], "good")
    assert not (tmp_path / "exploded").exists()


def test_the_demo_draws_what_each_sampler_makes(tmp_path):
    diffusion.main(["--steps", "5", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "samples.png").size == (800, 200)


# ---- text2mask.py: the mask codec --------------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 2, 6, 13, 25, 62, 133, 150, 214])
def test_codec_round_trip(K):
    rng = np.random.default_rng(K)
    ids = rng.integers(0, K + 1, (40, 50)).astype(np.uint8)
    noisy_colours = encode(ids, K).astype(int) + rng.integers(-9, 10, (40, 50, 3))
    assert len({tuple(colour) for colour in palette(K).tolist()}) == K + 2
    assert (decode(encode(ids, K), K) == ids).all()
    assert (decode(noisy_colours.clip(0, 255).astype(np.uint8), K) == ids).all()
    middle = palette(K)[1:3].mean(0).astype(np.uint8)
    assert decode(np.full((2, 2, 3), middle), K).max() == 0  # between two classes: void


def test_components_equal_a_flood_fill():
    rng = np.random.default_rng(0)
    for _ in range(30):
        values = rng.integers(0, 3, rng.integers(1, 13, 2))
        label = np.full(values.shape, -1)
        for start in np.ndindex(values.shape):
            todo = [start] if label[start] < 0 else []
            while todo:
                i, j = todo.pop()
                inside = 0 <= i < values.shape[0] and 0 <= j < values.shape[1]
                if inside and label[i, j] < 0 and values[i, j] == values[start]:
                    label[i, j] = start[0] * values.shape[1] + start[1]
                    todo += [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        assert (components(values) == label).all()


def test_clean_removes_specks_and_keeps_the_rest():
    truth = np.ones((20, 20), np.uint8)
    truth[:, 10:] = 2
    ids = truth.copy()
    ids[3:5, 3:5], ids[15, 15] = 3, 0
    assert (clean(ids, 8) == truth).all() and (clean(ids, 4)[3:5, 3:5] == 3).all()
    assert (grow(np.zeros((3, 3), bool), truth[:3, :3])[0] == truth[:3, :3]).all()  # nothing known: as it was


def touching_things(h=32, w=32):
    """(h, w) class ids and instances: two things side by side, of class 2 on class 1."""
    ids, instances = np.ones((h, w), np.uint8), np.zeros((h, w), np.uint8)
    ids[h // 4:h * 5 // 8, w // 8:w * 7 // 8] = 2
    instances[ids == 2] = 1
    instances[:, w // 2:] *= 2
    return ids, instances


def test_instances_come_back_from_their_outlines():
    ids, instances = touching_things()
    back, found = segments(outline(ids, instances, 2), [False, True])
    assert (back == ids).mean() > 0.9 and found.max() == 2
    assert len(set(zip(instances[10:18, 6:26].ravel(), found[10:18, 6:26].ravel()))) <= 4
    assert segments(ids, [False, True])[1].max() == 1  # without edges they are one
    assert (encode(ids, 2, instances) == palette(2)[outline(ids, instances, 2)]).all()


# ---- text2mask.py: the data set ----------------------------------------------------------------------------

def no_words(captions):
    return torch.zeros(len(captions), 4, dtype=torch.long)


def one_pair(root, ids, instances=None, image=None, caption="two balls"):
    """A pair folder of one pair, with sky (stuff) and ball (a thing)."""
    P.write_pair(root, "a", np.stack([90 * ids] * 3, -1) if image is None else image, ids, instances, [caption], K=2)
    P.write_json(root / "classes.json", [{"name": "sky"}, {"name": "ball", "isthing": True}])
    return PairFolder(root)


@pytest.mark.parametrize("size", [(64, 64), (72, 96), (256, 256), (768, 768)])
def test_generators_train_on_the_outlines_that_synthesis_paints(tmp_path, size):
    ids, instances = touching_things(480, 640)
    codes = CaptionedPairs(one_pair(tmp_path, ids, instances), size, no_words, augment=False)[0, 0]["codes"].numpy()
    crop = ResizeCrop(ids.shape, size)  # as ImgSyn crops
    assert (codes == outline(crop(ids), crop(instances), 2)).all()
    assert segments(codes.astype(np.uint8), [False, True])[1].max() == 2


def test_photos_shrink_by_the_mean_and_grow_smoothly():
    ramp = np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[None], 8, 0)  # 8 grey levels, 8 x 8
    half, double, photo = ResizeCrop((8, 8), (4, 4)), ResizeCrop((8, 8), (16, 16)), np.stack([ramp] * 3, -1)
    assert half(photo)[0, :, 0].tolist() == [16, 80, 144, 208]
    grown = double(photo)[0, 2:-2, 0].astype(int)
    assert len(set(grown)) == len(grown) and (np.diff(grown) > 0).all()  # no steps of two equal pixels
    assert set(np.unique(double(ramp))) | set(np.unique(half(ramp))) == set(np.unique(ramp))


def test_the_crop_of_a_mirror_image_is_counted_in_it(tmp_path):
    """Column x of a picture 64 wide has the value x: what is seen says where it was cut."""
    ramp, mirrored = np.broadcast_to(np.arange(64, dtype=np.uint8), (32, 64)), set()
    data = CaptionedPairs(one_pair(tmp_path, ramp % 3, image=np.stack([ramp] * 3, -1)), (32, 32), no_words)
    for seed in range(40):
        item = data[0, seed]
        seen = ((item["image"][0, 0] + 1) * 127.5).round().int()  # (32,)
        mirrored.add(mirror := bool(seen[0] > seen[-1]))
        assert seen[0] == (63 - item["time_ids"][3] if mirror else item["time_ids"][3])
        assert item["time_ids"][[0, 1, 2, 4, 5]].tolist() == [32, 64, 0, 32, 32]
        assert torch.equal(item["codes"][0], seen.long() % 3)
    assert mirrored == {True, False}


@pytest.mark.parametrize("caption, views", [("a house on the left.", 1), ("Right: a tree", 1), ("a bright house", 2)])
def test_captions_with_sides_are_never_mirrored(tmp_path, caption, views):
    pairs = one_pair(tmp_path, touching_things()[0] * np.tri(32, dtype=np.uint8), caption=caption)
    data = CaptionedPairs(pairs, (32, 32), no_words)
    assert len({data[0, seed]["codes"].numpy().tobytes() for seed in range(12)}) == views


def test_a_caption_is_chosen_or_composed(tmp_path):
    pairs = one_pair(tmp_path, touching_things()[0], caption="one\ntwo")
    data, fixed = (CaptionedPairs(pairs, (32, 32), list, augment) for augment in (True, False))
    assert {data[0, seed]["tokens"] for seed in range(12)} == {"one", "two"} and fixed[0, 5]["tokens"] == "one"
    (tmp_path / "captions" / "a.txt").unlink()
    assert data[0, 0]["tokens"] == "a picture of sky, ball"


# ---- text2mask.py, mask2img.py: the models -----------------------------------------------------------------

def small_model(cls, classes, size=(16, 16)):
    """A Text2Mask or Mask2Img of the tiny preset with random weights."""
    torch.manual_seed(0)
    tiny = nets.PRESETS["tiny"]
    unet, text = nets.UNet(**tiny["unet"]), nets.TextEncoder(**tiny["text"])
    base = TextToImage(unet, text, diffusion.Schedule(**mask2img.SCHEDULE), size)
    if cls is Text2Mask:
        return Text2Mask.from_base(base, size, classes)
    controlnet = nets.ControlNet.from_unet(unet, **tiny["controlnet"] | dict(conditioning_channels=len(classes) + 2))
    return Mask2Img(unet, text, base.schedule, controlnet, size, classes)


def test_the_weighted_loss_is_least_at_the_true_shares():
    """Rare codes weigh more while learning, and yet the logits that a network ends with are the log of the shares."""
    counts, K = torch.tensor([0, 200, 40, 16, 0]), 3
    codes = torch.repeat_interleave(torch.arange(K + 2), counts).view(1, 16, 16)
    weights = text2mask.count_class_weights({(0, 0): dict(codes=codes)}, K + 2)
    assert torch.allclose((weights * counts).sum(), torch.tensor(256.0)) and weights[0] == weights[4] == 1
    assert weights[3] / weights[1] == pytest.approx(200 / 16)
    model = small_model(Text2Mask, [dict(name=name, isthing=False) for name in "abc"])
    batch = dict(codes=codes, tokens=no_words(["x"]), time_ids=torch.zeros(1, 6))
    for model.class_weights in (weights, torch.ones(K + 2)):
        for share, least in ((counts / 256, True), (torch.tensor([0, 0.5, 0.3, 0.2, 0]), False)):
            z = (share + 1e-9).log().requires_grad_()
            loss = model.loss(lambda x, *_: z.view(1, -1, 1, 1).expand(1, -1, *x.shape[2:]), batch, 0.0)
            gradient, = torch.autograd.grad(loss, z)
            assert (gradient.abs().max() < 1e-6) == least


SHIPPED = REPO / "weights" / "shapes"
WEIGHTS = ("--text2mask", SHIPPED / "text2mask", "--mask2img", SHIPPED / "mask2img")


@pytest.mark.parametrize("cls, name", [(TextToImage, "base"), (Text2Mask, "text2mask"), (Mask2Img, "mask2img")])
def test_the_shipped_weights_load_and_are_saved_as_they_were(tmp_path, cls, name):
    diffusion.save(diffusion.load(cls, SHIPPED / name), tmp_path)
    config, state = diffusion.read_checkpoint(SHIPPED / name, cls.__name__)
    again, ours = diffusion.read_checkpoint(tmp_path, cls.__name__)
    assert ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in state)
    assert again["schedule"].items() >= config.pop("schedule").items() and again.items() >= config.items()


def test_a_sample_depends_on_its_own_caption_and_seed():
    model, captions = diffusion.load(Text2Mask, SHIPPED / "text2mask"), ["a red house by the water", "two trees", ""]
    together, maps = model.sample(captions, [1, 2, 3], steps=4, maps=True)
    for i, caption in enumerate(captions):
        assert (model.sample([caption], [i + 1], steps=4)[0] == together[i]).mean() > 0.99  # but for rounding
    assert (model.sample(captions[:1], [2], steps=4)[0] != together[0]).mean() > 0.05
    assert (decode(maps[0].clip(0, 255).round().astype(np.uint8), 13) == together[0]).mean() > 0.8


# ---- masksyn.py, imgsyn.py: the chain ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The first scenes of the built-in data: 12 to train on and 4 of val."""
    out = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 12, "val": 4, "unseen": 0})
        shapes.prepare(out, processes=1)
    return out


@pytest.fixture(scope="module")
def untrained(world, tmp_path_factory):
    """A folder with t/ and m/: both generators with random weights, at 16 x 16."""
    out, classes = tmp_path_factory.mktemp("untrained"), P.read_classes(world / "train")
    diffusion.save(small_model(Text2Mask, classes), out / "t")
    diffusion.save(small_model(Mask2Img, classes), out / "m")
    return out


def synthesis(module, data, models, *more):
    """The arguments of `call` for two short pairs; --out is left out."""
    more = (*(("--text2mask", models / "t", "--mask-steps", 2) if module is masksyn else ()), *more)
    return module, "--data", data, "--mask2img", models / "m", "--limit", 2, "--steps", 2, "--device", "cpu", *more


def test_generators_train_and_feed_both_syntheses(world, tmp_path):
    """base -> text2mask, mask2img -> masksyn, imgsyn, at a size that is no square; the first one as a user calls it."""
    flags = "--data", world, "--size", "32x16", "--steps", 2, "--batch", 2, "--limit", 4, "--device", "cpu"
    script = [sys.executable, REPO / "mask2img.py", "base", "--split", "train", *flags]
    subprocess.run(list(map(str, script)), cwd=tmp_path, check=True)
    base = tmp_path / "out" / world.name / "base"
    call(text2mask, "train", "--init", base, "--out", tmp_path / "t", "--edges", *flags)
    call(mask2img, "train", "--init", base, "--out", tmp_path / "m", "--edges", *flags)
    before, ours = (diffusion.read_checkpoint(*key)[1] for key in ((base, "TextToImage"), (tmp_path / "m", "Mask2Img")))
    assert all(torch.equal(before[name], ours[name]) for name in before)  # the base stayed frozen
    assert np.isfinite(json.loads((tmp_path / "m" / "log.jsonl").read_text())["condition_gap"])
    for module, more in ((masksyn, ()), (imgsyn, ("--per-mask", 2))):
        out = tmp_path / module.__name__
        call(*synthesis(module, world, tmp_path, *more), "--out", out)
        pairs = PairFolder(out)
        assert len(pairs) == 2 + len(more) and pairs.read(0)["image"].shape == (16, 32, 3) and pairs.has_instances
        assert pairs.captions(0)[0] == PairFolder(world / "train").captions(0)[0] and (out / "samples.png").exists()


@pytest.mark.parametrize("per_source, batch, world_size", [(1, 4, 1), (3, 4, 2), (2, 16, 3)])
def test_jobs_are_shared_out_and_more_of_them_leave_the_first_as_they_were(per_source, batch, world_size):
    sources = [f"s{i}" for i in range(10)]
    shares = [masksyn.split_jobs(sources, per_source, batch, rank, world_size) for rank in range(world_size)]
    jobs = [job for share in shares for jobs in share for job in jobs]
    assert sorted(jobs) == sorted((source, k) for source in sources for k in range(per_source))
    single, more = (masksyn.split_jobs(sources, count, batch, 0, 1) for count in (per_source, per_source + 1))
    longer = masksyn.split_jobs(sources * 2, 1, batch, 0, 1)
    assert more[:-(-10 // batch) * per_source] == single and longer[:10 // batch] == single[:10 // batch]


@pytest.mark.parametrize("module", [masksyn, imgsyn])
def test_a_synthetic_folder_is_a_pair_folder_of_its_own(world, untrained, tmp_path, module):
    """Without things in the data there is no instances/, and captions are composed where there are none."""
    data, out, models = shutil.copytree(world, tmp_path / "data"), tmp_path / "out", tmp_path / "models"
    classes = [c | {"isthing": False} for c in P.read_json(data / "train" / "classes.json")]
    P.write_json(data / "train" / "classes.json", classes)
    shutil.rmtree(data / "train" / "instances")
    shutil.rmtree(data / "train" / "captions")
    for cls, name in ((Text2Mask, "t"), (Mask2Img, "m")):
        diffusion.save(small_model(cls, classes), models / name)
    (out / "mine" / "deep").mkdir(parents=True)
    (out / "mine" / "deep" / ".tmp1.txt").write_text("not ours")
    (out / "mine" / ".tmp7.png").write_text("of a run that was killed")
    call(*synthesis(module, data, models, "--out", out))
    assert not (out / "instances").exists() and not (out / "mine" / ".tmp7.png").exists()
    (out / "mine" / "deep" / ".tmp1.txt").unlink()  # raises if it is gone
    assert P.read_json(out / "classes.json") == classes and PairFolder(out).captions(0)[0].startswith("a picture of ")
    before = snapshot(out)
    call(*synthesis(module, data, models, "--out", out))  # nothing to do
    assert snapshot(out) == before


@pytest.mark.parametrize("change", [
    ("--seed", 1), ("--steps", 3), ("--prompt", "a house"), "caption", "mask", "weights"])
def test_pairs_of_other_settings_data_or_weights_are_refused(world, untrained, tmp_path, change):
    data, models = shutil.copytree(world, tmp_path / "data"), shutil.copytree(untrained, tmp_path / "models")
    command = synthesis(masksyn, data, models, "--out", tmp_path / "out")
    call(*command)
    before = snapshot(tmp_path / "out")
    if change == "caption":
        (data / "train" / "captions" / "00005.txt").write_text("another caption\n")
    elif change == "mask":
        P.write_mask(data / "train" / "masks" / "00005.png", np.ones((64, 64), np.uint8), 13)
    elif change == "weights":
        model = diffusion.load(Mask2Img, models / "m")
        model.unet.conv_out.bias.data += 1
        diffusion.save(model, models / "m")
    more = change if isinstance(change, tuple) else ()
    assert "other settings, data or weights" in mistake(*command, *more) and snapshot(tmp_path / "out") == before


def test_more_pairs_leave_the_first_as_they_were(world, untrained, tmp_path):
    command = synthesis(masksyn, world, untrained, "--batch", 1, "--out", tmp_path)
    call(*command)
    before = snapshot(tmp_path / "images")
    call(*command, "--limit", 3, "--per-caption", 2)
    after = snapshot(tmp_path / "images")
    assert len(after) == 6 and before.items() <= after.items()


def test_generators_that_do_not_fit_are_refused(world, untrained, tmp_path):
    classes = P.read_classes(world / "train")
    diffusion.save(small_model(Mask2Img, classes, (16, 32)), tmp_path / "wide")
    diffusion.save(small_model(Mask2Img, classes[::-1]), tmp_path / "other")
    for name, words in (("wide", "Train both at one size"), ("other", "class 1 is person, where sky was expected")):
        command = synthesis(masksyn, world, untrained, "--mask2img", tmp_path / name, "--out", tmp_path / "out")
        assert words in mistake(*command) and not (tmp_path / "out").exists()


def test_default_weights_are_the_given_the_shipped_then_the_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(masksyn, "ROOT", tmp_path)
    shipped, find = tmp_path / "weights/shapes/text2mask", masksyn.find_weights
    assert find("shapes", "text2mask", None) == Path("out/shapes/text2mask")
    shipped.mkdir(parents=True)
    (shipped / "model.safetensors").touch()
    assert find("shapes", "text2mask", None) == shipped and find("shapes", "text2mask", Path("x")) == Path("x")
    assert find("data/mine/", "text2mask", None) == Path("out/mine/text2mask")


def test_a_prompt_is_painted_and_replaced_each_time(world, untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, out = shutil.copytree(world, tmp_path / "data"), tmp_path / "out" / "data" / "prompt"
    command = synthesis(masksyn, data, untrained, "--prompt")
    call(*command, "a house and a zeppelin, a house", "--count", 3)
    pairs = PairFolder(out)
    assert len(pairs) == 3 and (out / "samples.png").exists()
    assert len({pairs.read(i)["image"].tobytes() for i in range(3)}) == 3
    assert pairs.captions(2) == ["a house and a zeppelin, a house"] and "holds: zeppelin. " in capsys.readouterr().out
    call(*command, "a house", "--count", 1)
    assert len(PairFolder(out)) == 1 and "holds" not in capsys.readouterr().out
    before = snapshot(out)
    assert "empty" in mistake(*command, "  ") and "fewer steps" in mistake(*command, "a tree", "--steps", 1001)
    assert snapshot(out) == before  # a mistake replaces nothing
    shutil.rmtree(data / "train" / "captions")
    capsys.readouterr()
    call(*command, "zeppelin", "--count", 1)
    assert "holds" not in capsys.readouterr().out  # there are no captions to ask
    call(*command, "zeppelin", "--count", 1, "--data", "elsewhere")  # nor is there any need of data
    assert len(PairFolder(tmp_path / "out" / "elsewhere" / "prompt")) == 1
    finish(begin((*command, "a tree", "--count", 2, "--batch", 1), out, ranks=2))
    assert len(PairFolder(out)) == 2 and PairFolder(out).captions(0) == ["a tree"]


def test_a_caption_and_a_mask_are_painted(tmp_path):
    caption = "a red house by the water \u2014 na\u00efve caf\u00e9 \u65e5\u672c " * 9
    flags = "--device", "cpu", "--steps", 2
    call(text2mask, "sample", "--prompt", caption, "--size", "64x48", "--out", tmp_path, *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"mask.png", "colours.png", "legend.png"}
    ids = P.read_ids(tmp_path / "mask.png", 13)
    assert (np.asarray(Image.open(tmp_path / "colours.png")) == palette(13)[ids]).all() and ids.shape == (48, 64)
    call(mask2img, "sample", "--mask", tmp_path / "mask.png", "--prompt", "a house", "--count", 2,
         "--out", tmp_path / "deep" / "er", *flags)
    sheet = np.asarray(Image.open(tmp_path / "deep" / "er" / "images.png"))
    assert sheet.shape[1] > 3 * 128  # the mask and two images, enlarged
    assert {tuple(c) for c in palette(13)[np.unique(ids)].tolist()} <= {tuple(c) for c in sheet.reshape(-1, 3).tolist()}


# ---- resume, kill, ranks: every command that runs for long -------------------------------------------------

TRAIN = ("--size", 16, "--limit", 4, "--batch", 2, "--steps", 6, "--save-every", 3, "--device", "cpu")


def train_and_save_often(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(T.RECIPES["tiny"], "save_every", 2)
        T.main(argv)


# name -> (data, folder of generators) -> the arguments of `call`; --out is left out.
COMMANDS = {
    "text2mask": lambda data, models: (text2mask, "train", "--data", data, *TRAIN),
    "mask2img": lambda data, models: (mask2img, "train", "--data", data, *TRAIN),
    "masksyn": lambda data, models: synthesis(masksyn, data, models, "--limit", 12, "--batch", 1),
    "imgsyn": lambda data, models: synthesis(imgsyn, data, models, "--limit", 12, "--batch", 1),
    "train": lambda data, models: (
        SimpleNamespace(main=train_and_save_often), "--data", data, "--init", SHIPPED / "mask2former",
        "--task", "panoptic", "--synth", data / "val", "--size", 32, "--steps", 6, "--batch", 1,
        "--accumulate", 2, "--device", "cpu"),
}
each_command = pytest.mark.parametrize("name", COMMANDS)


def begin(command, out, ranks=1):
    """A command in processes of its own."""
    module, *args = command
    return start(module.main, [str(arg) for arg in (*args, "--out", out)], ranks=ranks)


def begun(out):
    """Whether a run that ends now leaves something to go on from."""
    return (out / "state.pt").exists() or len(list(out.glob("images/[!.]*.png"))) > 1


def kill_when_begun(command, out):
    process, = begin(command, out)
    while process.is_alive() and not begun(out):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9 and begun(out)  # it was caught in the middle


def results(out):
    """What must be the same in the end: all files but the optimiser's, and of the log the steps."""
    files = snapshot(out)
    steps = [json.loads(line)["step"] for line in files.pop("log.jsonl", b"").splitlines()]
    return {name: content for name, content in files.items() if name != "state.pt"}, steps


@pytest.fixture(scope="module")
def complete(world, untrained, tmp_path_factory):
    """complete(name) -> the command, and the results of its undisturbed run."""
    @functools.cache
    def run(name):
        command, out = COMMANDS[name](world, untrained), tmp_path_factory.mktemp(name) / "out"
        finish(begin(command, out))
        return command, results(out)
    return run


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def ctrl_c_when_begun(monkeypatch, out):
    """Ctrl-C after the first save, or the second pair."""
    def and_stop(function):
        def wrapper(*args, **options):
            function(*args, **options)
            if begun(out):
                raise KeyboardInterrupt
        return wrapper
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(diffusion.RunFolder, "save", and_stop(diffusion.RunFolder.save))
        patch.setattr(masksyn, "write_pair", and_stop(masksyn.write_pair))
        yield
    assert end.value.code == 130


@each_command
def test_a_stopped_command_goes_on_and_ends_the_same(complete, tmp_path, monkeypatch, capsys, one_thread, name):
    command, expected = complete(name)
    with ctrl_c_when_begun(monkeypatch, tmp_path):
        P.run(lambda: call(*command, "--out", tmp_path))
    assert "The same command goes on" in capsys.readouterr().err
    call(*command, "--out", tmp_path)
    assert results(tmp_path) == expected


@each_command
def test_a_killed_command_goes_on_and_ends_the_same(complete, tmp_path, name):
    command, expected = complete(name)
    kill_when_begun(command, tmp_path)
    finish(begin(command, tmp_path))
    assert results(tmp_path) == expected


@each_command
def test_two_ranks(complete, tmp_path, name):
    """They write the pairs that one writes. A training of two is another one, and a single rank does not resume it."""
    command, (files, steps) = complete(name)
    finish(begin(command, tmp_path, ranks=2))
    if "meta.json" in files:
        assert results(tmp_path) == (files, steps)
    else:
        assert results(tmp_path)[1] == steps and results(tmp_path)[0] != files
        assert "world 2 then, 1 now" in mistake(*command, "--out", tmp_path)
    if name == "train":  # the ranks share the images of val
        metrics = P.read_json(tmp_path / "metrics.json")["val"]
        expected = T.evaluate(m2f.load(tmp_path), PairFolder(command[2] / "val"), "panoptic", (32, 128))
        assert metrics == pytest.approx(expected, abs=0.05)
        assert metrics["images"] == 4 and metrics["PQ"] > 10


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_load_what_the_main_process_loads(complete, tmp_path, one_thread, method):
    command, expected = complete("text2mask")
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        call(*command, "--out", tmp_path, "--workers", 1)
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert results(tmp_path) == expected


# ---- mistakes of users -------------------------------------------------------------------------------------

def picture(path, change):
    """Spoil a picture of the data set `world` in the current folder."""
    return lambda: change(Image.open(f"world/{path}")).save(f"world/{path}")


def classes(split, *names):
    return lambda: P.write_json(f"world/{split}/classes.json", [{"name": name} for name in names])


IMAGE, MASK, INSTANCES = (f"train/{part}/00000.png" for part in ("images", "masks", "instances"))
# What comes before the flags of a row.
FLAGS = {"train": TRAIN, "base": TRAIN, "sample": ("--steps", 2), "imgsyn": ("--limit", 2, "--steps", 2, *WEIGHTS[2:]),
         "masksyn": ("--limit", 2, "--steps", 2, *WEIGHTS)}

# What is spoiled, the command, words of the message.
MISTAKES = [
    (lambda: os.remove(f"world/{MASK}"), "mask2img train", "masks: 00000 is missing"),
    (lambda: os.remove(f"world/{IMAGE}"), "masksyn", "images: 00000 is missing"),
    (classes("train", *map(str, range(215))), "text2mask train", "215 classes"),
    (classes("train", "sky"), "masksyn", "13 classes instead of 1"),
    (classes("val", "fog"), "mask2img train", "val: class 1 is fog, where sky was expected"),
    (lambda: Path("world", IMAGE).write_text("no picture"), "mask2img train", "00000.png: not a readable picture"),
    (picture(MASK, lambda mask: mask.convert("RGB")), "imgsyn", "mode RGB"),
    (picture(MASK, lambda mask: mask.resize((32, 32))), "mask2img train", "32 x 32 pixels, its image 64 x 64"),
    (picture(MASK, lambda mask: Image.new("L", (64, 64), 99)), "imgsyn", "holds the id 99, where 0 to 13"),
    (picture(INSTANCES, lambda _: Image.new("L", (64, 60))), "text2mask train --edges", "64 x 60 pixels"),
    (picture(INSTANCES, lambda _: Image.new("I;16", (64, 64), 256)), "mask2img train --edges", "holds the id 256"),
    (None, "masksyn --data nowhere", "nowhere: no data set"),
    (None, "imgsyn --split test", "test: no such folder. The splits there are: train, val"),
    (None, "mask2img base", "unlabelled: no such folder"),
    (None, "masksyn --steps 1001", "1001 sampling steps"),
    (None, "imgsyn --steps 100000000000000000000", "Use fewer steps"),
    (None, "masksyn --device foo", "device foo"),
    (None, "imgsyn --out world/train", "no meta.json of a synthesis"),
    (None, "masksyn --out world/train/classes.json", "classes.json"),
    (None, "imgsyn --mask2img nothing", "nothing: no such file. Train a Mask2Img"),
    (None, f"masksyn --text2mask {SHIPPED / 'mask2img'}", "holds a Mask2Img of format seggen-1, not a Text2Mask"),
    (None, "text2mask train --size 20", "size 20 x 20: not a multiple of 8"),
    (None, "text2mask train --init nothing", "no such file. Train a TextToImage"),
    (None, f"text2mask train --init {SHIPPED / 'mask2img'}", "not a TextToImage"),
    (None, "mask2img train --controlnet nothing", "--controlnet with SDXL"),
    (None, "text2mask sample --prompt x --size 65", "not a multiple of 8"),
    (None, "mask2img sample --mask nothing.png", "nothing.png: not a readable picture"),
    (None, f"mask2img sample --mask world/{IMAGE}", "mode RGB"),
    (picture(MASK, lambda _: Image.new("L", (60, 64))), f"mask2img sample --mask world/{MASK}", "60 x 64 pixels"),
    (picture(MASK, lambda _: Image.new("L", (64, 64), 14)), f"mask2img sample --mask world/{MASK}", "holds the id 14"),
]


@pytest.mark.parametrize("spoil, command, words", MISTAKES)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(world, tmp_path, monkeypatch, spoil, command, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, "world")
    if spoil:
        spoil()
    before = snapshot(tmp_path)
    name, *args = command.split()
    verb = [args.pop(0)] if name in ("text2mask", "mask2img") else []
    data = ["--data", "world"] if verb != ["sample"] else []
    flags = *data, "--out", "out", "--device", "cpu", *FLAGS[(verb or [name])[0]], *args
    assert words in mistake(sys.modules[name], *verb, *flags)
    assert snapshot(tmp_path) == before and not Path("out").exists()


@pytest.mark.parametrize("module, flags", [
    (text2mask, "train --lr nan"), (text2mask, "train --size 9000"), (text2mask, "sample --prompt x --guidance nan"),
    (mask2img, "train --workers -1"), (mask2img, "sample --mask x --guidance -1"), (mask2img, "base --init x"),
    (masksyn, "--limit 0"), (masksyn, "--limit -3"), (masksyn, "--guidance inf"), (imgsyn, "--per-mask 0"),
    (T, "--steps -3"), (T, "--p-synth 1.5"), (T, "--seed -1"), (T, "--size 0"), (C, "--seeds 0 -1"),
    (text2mask, "train --lr 0"), (text2mask, "train --size 1x2x3"), (shapes, "--size 8"),
    (shapes, "--limit-train 0"), (shapes, "--unlabelled -5"), (shapes, "--processes 0"),
    (camvid, "--root x --size 64x"), (ade, "--root x --size 0"), (coco, "--root x --size 1.5")])
def test_flags_that_are_no_numbers_are_refused(module, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(flags.split())
    assert stop.value.code == 2 and flags.split()[-1] in capsys.readouterr().err.splitlines()[-1]


def test_a_worker_that_reads_a_bad_picture_ends_in_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(PairFolder, "keep", lambda pairs: None)  # as with sets that do not fit into memory
    data = shutil.copytree(world, tmp_path / "data")
    for path in (data / "train" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    line = mistake(mask2img, "train", "--data", data, *TRAIN, "--workers", 1, "--out", tmp_path / "out")
    assert ".png: not a readable picture" in line


def test_a_base_or_data_of_the_same_name_but_changed_does_not_resume(world, tmp_path):
    data, base = shutil.copytree(world, tmp_path / "data"), shutil.copytree(SHIPPED / "base", tmp_path / "base")
    flags = "--data", data, "--init", base, *TRAIN, "--limit", 12, "--steps", 2, "--unfreeze", "--out", tmp_path / "m"
    command = mask2img, "train", *flags
    call(*command)
    before = snapshot(tmp_path / "m")
    call(*command)  # nothing to do, nothing to refuse
    model, trained = diffusion.load(TextToImage, base), diffusion.load(Mask2Img, tmp_path / "m")
    assert not torch.equal(model.unet.conv_in.weight, trained.unet.conv_in.weight)  # --unfreeze trains the base
    model.unet.conv_out.bias.data += 1
    diffusion.save(model, base)
    assert f"(init {base}" in (line := mistake(*command)) and line.count(" then, ") == 1
    shutil.copy(SHIPPED / "base" / "model.safetensors", base)
    for part in ("images", "masks", "instances", "captions"):
        next((data / "train" / part).glob("00011.*")).unlink()
    assert "(pairs 12 pairs" in (line := mistake(*command)) and ", 11 pairs" in line
    assert snapshot(tmp_path / "m") == before


# ---- paper scale: a folder of SDXL, at toy widths ----------------------------------------------------------

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pairs of 48 x 48 with two captions each, and a val."""
    out, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        classes = [{"name": name, "isthing": name == "cat"} for name in ("sky", "mat", "cat", "fog")]
        P.write_json(out / split / "classes.json", classes)
        for i in range(3):
            ids, instances = (np.roll(part, 5 * i, 1) for part in touching_things(48, 48))
            image = (60 * ids[..., None] + rng.integers(0, 60, (48, 48, 3))).astype(np.uint8)
            captions = ["a cat on the mat", "a red and white mat"]
            P.write_pair(out / split, f"{i:03d}", image, ids + 1, instances, captions, K=4)
    return out


def paper(module, base, photos, **flags):
    """The arguments of `call` for a small training on a folder of SDXL; --out is left out."""
    flags = dict(init=base, data=photos, size=48, batch=2, steps=2, workers=0, device="cpu") | flags
    flags = [(f"--{key.replace('_', '-')}", value) for key, value in flags.items()]
    return module, "train", *sum(flags, ())


@pytest.fixture(scope="module")
def on_sdxl(sdxl, photos, tmp_path_factory):
    """A folder with t/ and m/: both generators, trained two steps on the small SDXL."""
    out = tmp_path_factory.mktemp("on_sdxl")
    call(*paper(text2mask, sdxl / "base", photos), "--out", out / "t")
    call(*paper(mask2img, sdxl / "base", photos), "--out", out / "m")
    return out


@pytest.mark.peer
def test_what_is_trained_on_sdxl_opens_in_the_public_library(on_sdxl):
    import diffusers
    models = diffusion.load(Text2Mask, on_sdxl / "t"), diffusion.load(Mask2Img, on_sdxl / "m")
    assert models[0].text is models[1].text and models[0].vae is models[1].vae  # once in memory
    for name, part, cls in (("t", "unet.", diffusers.UNet2DConditionModel),
                            ("m", "controlnet.", diffusers.ControlNetModel)):
        average = torch.load(on_sdxl / name / "state.pt", weights_only=True)["average"]
        theirs = cls.from_pretrained(on_sdxl / name, low_cpu_mem_usage=False).state_dict()
        assert {part + key for key in theirs} == set(average["params"]) == set(average["shadow"])
        assert all(torch.equal(p, average["shadow"][part + key]) for key, p in theirs.items())
    unet = models[1].unet.state_dict()
    for key, p in theirs.items():  # 2 steps of 1e-5 from a copy, or from zero
        if key in unet or ".conv_out." in key or key.startswith(("controlnet_down", "controlnet_mid")):
            assert (p - unet.get(key, 0)).abs().max() < 1e-4, key


@pytest.mark.peer
def test_sdxl_feeds_both_syntheses(on_sdxl, photos, tmp_path):
    text, encoded = diffusion.load(Text2Mask, on_sdxl / "t").text, []
    hook = text.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    call(*synthesis(masksyn, photos, on_sdxl, "--limit", 3, "--out", tmp_path / "masksyn"))
    hook.remove()
    assert encoded == [1, 1] * 2  # the caption of all pairs and none, once each
    call(*synthesis(imgsyn, photos, on_sdxl, "--out", tmp_path / "imgsyn"))
    for name, count in (("masksyn", 3), ("imgsyn", 2)):
        pairs = PairFolder(tmp_path / name)
        assert len(pairs) == count and pairs.read(0)["image"].shape == (48, 48, 3)
        assert pairs.captions(0) == ["a cat on the mat"]
    flags = "--steps", 2, "--out", tmp_path, "--device", "cpu"
    call(text2mask, "sample", "--init", on_sdxl / "t", "--prompt", "a cat", *flags)
    call(mask2img, "sample", "--init", on_sdxl / "m", "--mask", tmp_path / "mask.png", "--count", 1, *flags)
    assert {path.name for path in tmp_path.glob("*.png")} == {"mask.png", "colours.png", "legend.png", "images.png"}


@pytest.mark.peer
@torch.no_grad()
def test_the_public_pipeline_paints_our_image(sdxl, on_sdxl, tmp_path):
    import diffusers
    model = diffusion.load(Mask2Img, on_sdxl / "m")
    noisy(model.controlnet, seed=5)  # two steps from zero would hide its work
    model.controlnet.controlnet_cond_embedding.conv_out.weight.data *= 30
    diffusion.save(model, tmp_path)
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        sdxl / "base", controlnet=diffusers.ControlNetModel.from_pretrained(tmp_path), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    cond = model.condition(torch.randint(0, 5, (1, 48, 48), generator=torch.Generator().manual_seed(0)))
    noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(7))
    for guidance in (4.0, 1.0):
        ours = model.generate(["a red cat"], [7], 8, guidance, "euler", (48, 48), (cond,), (cond,))
        theirs = pipe("a red cat", image=cond, height=48, width=48, num_inference_steps=8, guidance_scale=guidance,
                      latents=noise, output_type="pt").images
        assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-3
        assert ours.clamp(-1, 1).std() > 0.05  # a picture, not one colour
    other = model.generate(["a red cat"], [7], 8, 1.0, "euler", (48, 48), (cond.flip(3),))
    assert (other - ours).abs().max() > 1e-2  # the mask matters


@pytest.mark.peer
def test_a_public_controlnet_is_trained_on(sdxl, photos, tmp_path):
    import diffusers
    unet = diffusers.UNet2DConditionModel.from_pretrained(sdxl / "base" / "unet")
    theirs = noisy(diffusers.ControlNetModel.from_unet(unet), seed=4)
    theirs.save_pretrained(tmp_path / "theirs")
    config = dict(theirs.config) | dict(transformer_layers_per_block=(1, 1))
    diffusers.ControlNetModel.from_config(config).save_pretrained(tmp_path / "shallow")
    command = paper(mask2img, sdxl / "base", photos, steps=1, lr=1e-12)
    call(*command, "--controlnet", tmp_path / "theirs", "--out", tmp_path / "m")
    ours = diffusion.load(Mask2Img, tmp_path / "m").controlnet.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.allclose(p, ours[name], atol=1e-6) for name, p in theirs.state_dict().items())
    line = mistake(*command, "--controlnet", tmp_path / "shallow", "--out", tmp_path / "out")
    assert "shallow: not the weights of this ControlNet" in line and not (tmp_path / "out").exists()


@pytest.mark.peer
def test_a_stopped_sdxl_training_resumes_bit_for_bit(sdxl, photos, tmp_path, monkeypatch):
    command = paper(text2mask, sdxl / "base", photos, lr=1e-3, save_every=1)
    call(*command, "--out", tmp_path / "a")
    with ctrl_c_when_begun(monkeypatch, tmp_path / "b"):
        P.run(lambda: call(*command, "--out", tmp_path / "b"))
    assert results(tmp_path / "b") != results(tmp_path / "a")
    call(*command, "--out", tmp_path / "b")
    assert results(tmp_path / "b") == results(tmp_path / "a")


@pytest.mark.peer
def test_bf16_as_on_a_gpu(sdxl, photos, on_sdxl, tmp_path, monkeypatch):
    """What CUDA does, on the CPU: autocast in training, frozen weights and sampling in bf16, VAE fp32."""
    monkeypatch.setattr(text2mask, "read_frozen", text2mask.read_frozen.__wrapped__)  # not the shared fp32 ones
    images, args = [], (["a red cat"], [7], 4, 3.0, "dpm++", (48, 48))
    for kind in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(diffusion, "precision", lambda device: kind)
        model = diffusion.load(Mask2Img, on_sdxl / "m")  # the same network in both
        cond = model.condition(torch.arange(48 * 48).reshape(1, 48, 48) % 5)
        images.append(model.generate(*args, (cond,), (cond,)))
    assert 0 < error(images[1], images[0]) < 0.05
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "autocast", None)  # bf16 weights are sampled without
        assert torch.equal(model.generate(*args, (cond,), (cond,)), images[1])
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in model.named_children()}
    assert kinds == dict(unet={kind}, text={kind}, vae={torch.float32}, controlnet={kind})
    for module, name in ((text2mask, "t"), (mask2img, "m")):
        call(*paper(module, sdxl / "base", photos), "--out", tmp_path / name)
        loss, right = (json.loads((out / name / "log.jsonl").read_text())["loss"] for out in (tmp_path, on_sdxl))
        assert loss != right and abs(loss - right) < 0.05 * right
        state = torch.load(tmp_path / name / "state.pt", weights_only=True)
        assert all(p.dtype == torch.float32 for p in state["average"]["params"].values())  # what is trained stays fp32


@pytest.mark.peer
@pytest.mark.parametrize("part, more, words", [
    ("unet/config.json", (), "unet/config.json"), ("scheduler", (), "scheduler: no such folder"),
    (None, ("--size", 44), "size 44 x 44: not a multiple of 8"),
    (None, ("--controlnet", "nothing"), "nothing: no weights"), (None, ("--unfreeze",), "--unfreeze")])
def test_what_does_not_go_with_sdxl_is_refused(sdxl, photos, tmp_path, part, more, words):
    base = shutil.copytree(sdxl / "base", tmp_path / "base")
    if part:
        (base / part).rename(tmp_path / "gone")
    assert words in mistake(*paper(mask2img, base, photos), *more, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_defaults_follow_the_base(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").touch()  # the layout of a public pipeline
    seen, sdxl = [], ("--init", tmp_path)
    monkeypatch.setattr(text2mask, "train", seen.append)
    for flags, expected in (((), ((64, 64), 5000, 16, 2e-3, 0)), (sdxl, ((768, 768), 30_000, 4, 1e-5, 4)),
                            ((*sdxl, "--lr", 3e-6, "--size", "96x72"), ((72, 96), 30_000, 4, 3e-6, 4))):
        call(text2mask, "train", *flags)
        text2mask.apply_recipe(seen[-1])
        assert tuple(getattr(seen[-1], key) for key in ("size", "steps", "batch", "lr", "workers")) == expected


# ---- the generators on CUDA --------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("command", [
    (mask2img, "base", "--split", "train"), (text2mask, "train"), (mask2img, "train"),
    (T, "--task", "panoptic")])
def test_mixed_precision_learns_as_fp32_on_the_cpu(world, tmp_path, command, compiled):
    """The first 50 steps of a training: weights stay fp32; the mean loss is the same but for other noise."""
    losses = []
    for device in ("cpu", "cuda"):
        out, more = tmp_path / device, ["--compile"] if compiled and device == "cuda" else []
        flags = "--data", world, "--size", 32, "--batch", 4, "--steps", 50, "--device", device, "--out", out
        call(*command, *flags, *more)
        losses.append(json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"])
        state = torch.load(out / "state.pt", weights_only=True, map_location="cpu")
        params = state["model"] if "model" in state else state["average"]["params"]
        assert {p.dtype for p in params.values()} == {torch.float32}
    assert abs(losses[0] - losses[1]) < 0.2 * losses[0], losses


@pytest.mark.gpu
def test_a_gpu_paints_what_the_cpu_paints(world, tmp_path):
    """Each sample's noise comes from the CPU, so that the shipped weights give the same pairs but for rounding."""
    for device in ("cpu", "cuda"):
        call(masksyn, "--data", world, *WEIGHTS, "--limit", 8, "--device", device, "--out", tmp_path / device)
    ours, theirs = PairFolder(tmp_path / "cuda"), PairFolder(tmp_path / "cpu")
    same = np.mean([ours.read(i)["ids"] == theirs.read(i)["ids"] for i in range(8)])
    apart = np.mean([np.abs(ours.read(i)["image"].astype(int) - theirs.read(i)["image"]) for i in range(8)])
    assert same > 0.97 and apart < 4, (same, apart)


@pytest.mark.gpu
def test_a_gpu_training_that_was_killed_goes_on(world, tmp_path):
    """Some kernels add in no fixed order: to rounding, not bit for bit."""
    command = text2mask, "train", "--data", world, *TRAIN, "--steps", 30, "--save-every", 10, "--device", "cuda"
    call(*command, "--out", tmp_path / "a")
    kill_when_begun(command, tmp_path / "b")
    call(*command, "--out", tmp_path / "b")
    a, b = (torch.load(tmp_path / out / "state.pt", weights_only=True, map_location="cpu")["average"]["params"]
            for out in "ab")
    assert all(error(b[name], p) < 0.02 for name, p in a.items() if p.abs().max() > 0)


# ---- mask2former.py ----------------------------------------------------------------------------------------


TOY = dict(m2f.PRESETS["tiny"], queries=12, isthing=[False, True, True])


def toy_model(**changes):
    torch.manual_seed(0)
    return m2f.Mask2Former(3, **{**TOY, **changes})


def some_targets(*labels, size=(32, 32)):
    """Targets for SetLoss: each mask is a random choice of 16 blocks."""
    blocks = torch.empty(len(labels), 4, 4).uniform_() > 0.6
    rows, columns = (torch.arange(n) * 4 // n for n in size)
    return {"labels": torch.tensor(labels, dtype=torch.long), "masks": blocks[:, rows][:, :, columns]}


def equal_points(*size, device="cpu", **options):
    """Stands in for torch.rand: the same points for every mask, in any order of the calls."""
    generator = torch.Generator().manual_seed(size[-2])
    return torch.empty(1, *size[-2:]).uniform_(generator=generator).repeat(*size[:-2], 1, 1).to(device)


def brute_force(cost):
    n, m = cost.shape
    return min(itertools.permutations(range(m), n), key=lambda columns: cost[range(n), list(columns)].sum())


def textbook(cost):
    """One problem, by dynamic programming: the cheapest way to give the rows so far just these columns."""
    best = {frozenset(): (0, [])}
    for row in cost:
        longer = [(total + price, [*columns, j]) for total, columns in best.values()
                  for j, price in enumerate(row) if j not in columns]
        best = {frozenset(columns): (total, columns) for total, columns in sorted(longer, reverse=True)}
    return min(best.values())[1]


@pytest.mark.parametrize("solve, largest, turns", [
    (brute_force, 6, 60), (textbook, 9, 30), pytest.param(lambda cost: pytest.importorskip(
        "scipy.optimize").linear_sum_assignment(cost)[1], 60, 30, marks=pytest.mark.peer)])
def test_hungarian_equals(solve, largest, turns):
    """10 problems of several heights side by side: random, with ties, rows that all want the same column."""
    rng = np.random.default_rng(0)
    for turn in range(turns):
        n = int(rng.integers(0, largest))
        m, rows = int(rng.integers(n, largest + 1)), rng.integers(0, n + 1, 10)
        cost = rng.normal(size=(10, n, m))
        cost = (cost, np.round(cost), 1e-3 * cost + rng.normal(size=(10, 1, m)))[turn % 3]
        for c, k, columns in zip(cost, rows, m2f.hungarian(cost, rows)):
            assert len(set(columns[:k])) == k and (columns[:k] >= 0).all() and (columns[k:] == -1).all()
            best = c[range(k), list(solve(c[:k]))].sum() if k else 0
            assert c[range(k), columns[:k]].sum() == pytest.approx(best, abs=1e-7)


@torch.no_grad()
def test_deformable_attention_equals_a_slow_loop():
    """A point reads the pixels less than one row and one column away, by (1 - |dx|) (1 - |dy|)."""
    torch.manual_seed(0)
    layer, sizes, N, heads = m2f.DeformableAttention(8, 2), [(2, 3), (4, 5), (7, 9)], 89, 2
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x, code, centres = torch.randn(1, N, 8), torch.randn(1, N, 8), torch.rand(N, 2)
    query, value = (x + code)[0], layer.value(x)[0].view(N, heads, 4)
    offsets = layer.offsets(query).view(N, heads, 3, 4, 2)
    weights = layer.weights(query).view(N, heads, 12).softmax(-1).view(N, heads, 3, 4)
    slow, maps = torch.zeros(N, heads, 4), value.split([6, 20, 63])
    for n, m, level, p in itertools.product(range(N), range(heads), range(3), range(4)):
        h, w = sizes[level]
        column, row = centres[n] * torch.tensor([w, h]) - 0.5 + offsets[n, m, level, p]
        near = F.relu(1 - (torch.arange(h) - row).abs()).outer(F.relu(1 - (torch.arange(w) - column).abs()))
        slow[n, m] += weights[n, m, level, p] * near.flatten() @ maps[level][:, m]
    assert torch.allclose(layer(x, code, centres, sizes)[0], layer.out(slow.flatten(1)), atol=1e-4)


def test_big_maps_are_read_again_in_the_backward_pass(monkeypatch):
    inputs = torch.rand(1, 32, 9, 9), torch.rand(1, 4, 33_000, 2), torch.rand(1, 1, 4, 33_000)
    inputs = [x.requires_grad_() for x in inputs]
    read, reads, grads = m2f.read_points, [], []
    monkeypatch.setattr(m2f, "read_points", lambda *a: reads.append(a) or read(*a))
    for function in (read, m2f.DeformableAttention(32, 1).read):
        grads.append(torch.autograd.grad(function(*inputs).pow(2).sum(), inputs))
    assert len(reads) == 2 and all(torch.equal(a, b) for a, b in zip(*grads))


def test_sizes_and_first_weights_are_the_originals():
    """Millions of parameters by the paper; xavier_uniform and c2_xavier_fill in the pixel decoder."""
    with torch.device("meta"):
        models = [m2f.Mask2Former(133, **preset) for name, preset in m2f.PRESETS.items() if name != "tiny"]
    assert [round(sum(p.numel() for p in m.parameters()) / 1e6) for m in models] == [44, 63, 47, 69, 107, 216]
    net = m2f.PixelDecoder((64, 128, 256, 512), layers=1)
    cases = [(conv, 6 / (conv.in_channels + 256)) for conv, _ in net.inputs]
    cases += [(conv, 3 / conv.weight[0].numel()) for conv in (net.lateral[0], net.smooth[0], net.masks)]
    for conv, square in cases:
        assert 0.99 * square < conv.weight.pow(2).max() <= square * (1 + 1e-6)
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("name, labels", [("tiny", [0, 2]), ("resnet50", [1]), ("swin_t", [])])
def test_backbones_compute_a_batch_as_its_images_and_train_in_bf16(name, labels):
    """The loss is in fp32, and finite for masks without a pixel (resnet50) and no targets (swin_t) too."""
    model, x = toy_model(backbone=name).eval(), torch.rand(2, 3, 64, 64)
    truth = [some_targets(), some_targets(*labels)]
    truth[1]["masks"] &= name == "tiny"
    for a, b in zip(model(x), model(x[1:]), strict=True):
        assert torch.allclose(a["class_logits"][1:], b["class_logits"], atol=1e-4)
        assert torch.allclose(m2f.mask_logits(a)[1:], m2f.mask_logits(b), atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert name != "resnet50" or model.backbone(x)[0].dtype == torch.bfloat16  # frozen norms keep it
        loss, parts = model.loss(model.train()(x), truth)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-5)
    assert (parts["mask"] + parts["dice"] > 0) == (len(labels) > 0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("task, labels, areas", [("semantic", [0, 1, 2], [2, 4, 1]), (
    "panoptic", [0, 1, 1, 2], [2, 1, 2, 1]), ("instance", [1, 1, 2], [1, 2, 1])])
def test_targets_of_a_task(task, labels, areas):
    ids, parts = np.array([[0, 1, 1, 2], [2, 2, 2, 3]]), np.array([[9, 5, 6, 1], [2, 2, 255, 1]])
    truth, empty = (m2f.targets(i, p, TOY["isthing"], task) for i, p in ((ids, parts), (0 * ids, None)))
    assert truth["labels"].tolist() == labels and truth["masks"].sum((1, 2)).tolist() == areas
    assert empty["labels"].shape == (0,) and empty["masks"].shape == (0, 2, 4)
    assert truth["masks"].dtype == empty["masks"].dtype == torch.bool


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_of_too_many_targets_the_costliest_are_left_out(monkeypatch, scale):
    """4 queries; one image has 9 targets, the other 1. The cheapest assignment counts, and nothing else."""
    monkeypatch.setattr(torch, "rand", equal_points)
    torch.manual_seed(0)
    loss, truth = m2f.SetLoss(3, points=256), [some_targets(*[0, 1, 2] * 3), some_targets(2)]
    logits, embed, features = torch.randn(1, 2, 4, 4), scale * torch.randn(1, 2, 4, 8), torch.rand(2, 8, 9, 9)
    outputs = [{"class_logits": logits[0], "mask_embed": embed[0], "features": features}]
    inputs = logits, embed, features, [t["labels"] for t in truth], [t["masks"].float() for t in truth], None
    cost, other_cost = (loss.costs(image, *inputs)[0].numpy() for image in (0, 1))  # (Q, 9), (Q, 1)
    query = loss.match(*inputs)[0].numpy()  # (10,)
    kept = np.flatnonzero(query[:9] >= 0)
    assert sorted(query[kept]) == [0, 1, 2, 3] and query[9] == other_cost.argmin()
    assert cost[query[kept], kept].sum() == pytest.approx(cost[range(4), brute_force(cost)].sum(), rel=1e-5)
    _, all_ten = loss(outputs, truth, num_masks=9)
    truth[0] = {name: value[kept] for name, value in truth[0].items()}
    _, only_five = loss(outputs, truth, num_masks=9)
    assert all(all_ten[k] > 0 and torch.allclose(all_ten[k], only_five[k]) for k in all_ten)


def test_valid_leaves_void_out_of_the_mask_losses():
    """Masks that differ only in void pixels; an image without "valid" beside one that has it."""
    model, losses = toy_model(), []
    outputs, valid = model(torch.rand(2, 3, 32, 32)), torch.arange(32).expand(32, 32).T < 16
    mask, other = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    mask[:, :16, :16] = other[:, :16, :16] = other[:, 20:] = True
    for first, second in (({}, {"masks": mask, "valid": valid}), ({}, {"masks": other}),
                          ({"valid": valid | True}, {"masks": other, "valid": valid})):
        torch.manual_seed(1)
        _, parts = model.loss(outputs, [some_targets() | first, some_targets(0) | second])
        losses.append(torch.stack([parts["mask"], parts["dice"]]))
    assert torch.allclose(losses[0], losses[2]) and not torch.isclose(losses[0], losses[1]).any()


@pytest.mark.parametrize("task", m2f.TASKS)
@pytest.mark.parametrize("size, resized", [((1, 1), (40, 40)), ((1, 70), (2, 160)), ((47, 61), (40, 52))])
@torch.no_grad()
def test_any_image_size(task, size, resized):
    """PIL, bytes and floats give the same; ids and instances are what the segments say, the surest on top."""
    model = toy_model()
    model.decoder.classes.weight.mul_(20)  # surer of its classes
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert m2f.resize(image / 255, 40).shape[1:] == resized  # a thin one grows up to a limit
    results = [m2f.predict(model, x, task) for x in (Image.fromarray(pixels), image, image / 255)]
    assert all(torch.equal(r[0], results[0][0]) and torch.equal(r[1], results[0][1]) for r in results)
    assert not model.training  # predict leaves it in eval mode
    for ids, instances, segments in (results[0], m2f.predict(model, image, task, short=40)):
        scores, want = [s["score"] for s in segments], torch.zeros(2, *size, dtype=torch.long)
        assert scores == ([None] * len(scores) if task == "semantic" else sorted(scores, reverse=True))
        for s in reversed([s for s in segments if task != "instance" or s["score"] > 0.5]):
            assert task == "instance" or not want[0][s["mask"]].any()  # no overlap
            want[0][s["mask"]] = s["class"]
            want[1][s["mask"]] = task != "semantic" and TOY["isthing"][s["class"] - 1]
        assert torch.equal(ids, want[0]) and torch.equal((instances > 0).long(), want[1])


@torch.no_grad()
def test_scales_and_flips_equal_a_slow_loop():
    """The image in two sizes, mirrored and not, padded with the mean colour; scores query by query."""
    model, scores, (H, W) = toy_model().eval(), 0, (50, 73)
    torch.nn.init.normal_(model.decoder.classes.weight, std=0.3)
    model.decoder.masks[4].weight.mul_(30)  # classes that differ by place
    image = F.interpolate(torch.rand(1, 3, 4, 6), (H, W), mode="bicubic")[0].clamp(0, 1)
    for (h, w), mirror in itertools.product([(25, 36), (50, 73)], (False, True)):
        scaled = F.interpolate(image[None], (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)
        padded = torch.tensor(m2f.MEAN)[:, None, None].repeat(1, -(-h // 16) * 16, -(-w // 16) * 16)
        padded[:, :h, :w] = scaled.flip(2) if mirror else scaled
        output = model(padded[None])[-1]
        for classes, mask in zip(output["class_logits"][0].softmax(1), m2f.mask_logits(output)[0]):
            mask = F.interpolate(mask[None, None], padded.shape[1:], mode="bilinear")[..., :h, :w]
            mask = F.interpolate(mask, (H, W), mode="bilinear")[0, 0].sigmoid()
            scores = scores + classes[:-1, None, None] * (mask.flip(1) if mirror else mask)
    ids, _, _ = m2f.predict(model, image, "semantic", scales=(0.5, 1.0), flip=True)
    assert len(ids.unique()) > 1 and (ids == scores.argmax(0) + 1).float().mean() > 0.999  # ties may differ


@pytest.mark.peer
def test_outputs_loss_and_gradients_equal_transformers(tmp_path, monkeypatch, request):
    """Ours loads the folder of theirs. In double precision, rounding moves no ReLU or mask across zero."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "rand", equal_points)
    torch.manual_seed(0)
    swin = transformers.SwinConfig(**m2f.SWINS["swin_t"] | {"window_size": 7}, out_indices=[1, 2, 3, 4])
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_labels=7, train_num_points=1024)
    theirs = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.02
    theirs.save_pretrained(folder := tmp_path / "mask2former-swin-tiny-coco-instance")
    ours = m2f.load(folder)
    assert [ours.config[k] for k in ("task", "backbone", "num_classes")] == ["instance", "swin_t", 7]
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    theirs.double()
    ours.double().loss.points = 1024  # the official ones have more
    for size in ((128, 96), (5, 90), (37, 74)):
        x, truth = torch.randn(2, 3, *size), [some_targets(0, 5, 5, size=size), some_targets(6, size=size)]
        last = theirs((x - ours.mean) / ours.std, mask_labels=[t["masks"].double() for t in truth],
                      class_labels=[t["labels"] for t in truth], output_auxiliary_logits=True)
        outputs = ours(x)
        for a, b in zip([*last.auxiliary_logits, last], outputs, strict=True):
            assert torch.allclose(a["class_queries_logits"], b["class_logits"], 1e-6)
            assert torch.allclose(a["masks_queries_logits"], m2f.mask_logits(b), 1e-6)
        loss, _ = ours.loss(outputs, truth)
        assert abs(last.loss - loss) < 1e-6 * loss
    (last.loss + loss).backward()
    for p in theirs.parameters():  # gradients saved as weights:
        p.data = (torch.zeros_like(p) if p.grad is None else p.grad).float()  # our loader renames them
    theirs.save_pretrained(tmp_path)
    for want, p in zip(m2f.load(tmp_path).parameters(), ours.parameters(), strict=True):
        assert (want - p.grad).norm() < 1e-4 * want.norm() + 1e-9


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(3))
def test_postprocessing_equals_transformers(seed):
    """Saturated logits of overlapping boxes, as after training. Theirs also fills the pixels of no mask."""
    processor = pytest.importorskip("transformers").Mask2FormerImageProcessor()
    rng, size, isthing = np.random.default_rng(seed), (384, 384), [False] * 3 + [True] * 3
    masks, logits = torch.full((20, *size), -12.0), torch.zeros(20, 7)
    for q, (y, x, h, w) in enumerate(rng.integers((0, 0, 32, 32), (288, 288, 96, 96), (20, 4))):
        masks[q, y:y + h, x:x + w] = 12 + q * 0.1
        logits[q, rng.integers(0, 7)] = 5 + 5 * rng.random()
    prediction = {"class_logits": logits, "mask_logits": masks, "padded": size, "size": size}
    both = SimpleNamespace(class_queries_logits=logits[None], masks_queries_logits=masks[None])

    def triples(segments):
        return sorted((k, round(score, 4), mask.bool().numpy().tobytes()) for k, score, mask in segments)

    ids, _, _ = m2f.postprocess(prediction, size, "semantic", isthing)
    assert torch.equal(ids, processor.post_process_semantic_segmentation(both)[0] + 1)
    number, infos = processor.post_process_panoptic_segmentation(both, 0.8, label_ids_to_fuse=[])[0].values()
    number *= (masks[logits.softmax(1)[:, :6].amax(1) > 0.8] > 0).any(0)
    want = triples((s["label_id"] + 1, s["score"], number == s["id"]) for s in infos)
    ids, _, found = m2f.postprocess(prediction, size, "panoptic", [True] * 6)
    assert triples(s.values() for s in found) == want and torch.equal(ids > 0, number > 0)
    scores = [s["score"] for s in found]
    assert scores == sorted(scores, reverse=True)  # best first
    fused, instances, found = m2f.postprocess(prediction, size, "panoptic", isthing)
    assert torch.equal(fused, ids) and torch.equal(instances > 0, ids > 3)
    assert all(s["class"] > 3 or torch.equal(s["mask"], ids == s["class"]) for s in found)
    assert instances.max() == sum(k > 3 for k, _, _ in want)
    maps, infos = processor.post_process_instance_segmentation(both, 0.0, return_binary_maps=True)[0].values()
    want = triples((s["label_id"] + 1, s["score"], mask) for s, mask in zip(infos, maps))
    for things in ([True] * 6, isthing):
        _, _, found = m2f.postprocess(prediction, size, "instance", things, top=20)
        assert triples(s.values() for s in found) == [triple for triple in want if things[triple[0] - 1]]


def test_save_and_load(tmp_path):
    model = toy_model(class_names=["a", "b", "c"], task="instance").half()
    m2f.save(model, path := tmp_path / "a/model.safetensors")
    again = m2f.load(tmp_path / "a")
    assert again.config == model.config and not again.training
    assert m2f.load(path, "semantic").config["task"] == "semantic"
    assert all(torch.equal(p.float(), again.state_dict()[key]) for key, p in model.state_dict().items())
    os.umask(umask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(OSError, match="No space"), m2f.atomic_write(tmp_path / "a/x.png") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path / "a") == ["model.safetensors"]
    assert m2f.load(Path(m2f.__file__).parent / "weights/shapes/mask2former").config["num_classes"] == 13


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with images, weights of ours, and others with a config.json, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text('{"pre_norm":0,"backbone_config":{"hidden_act":"gelu","embed_dim":96}}')
    m2f.save_file({"x": torch.zeros(1)}, "hub.safetensors")
    m2f.save(toy_model(class_names=["sky", "house", "tree"], task="semantic"), "w/model.safetensors")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for mode in ("RGB", "L", "RGBA", "P"):
        image.convert(mode).save(f"{mode}.png")
    exif = image.getexif()
    exif[0x0112] = 6  # held upright
    image.resize((64, 32)).save("photo.jpg", exif=exif)
    image.resize((3000, 20)).save("wide.png")


def test_the_command_draws_overlays(desk, capsys):
    for task in ([], ["--task", "instance"], ["--task", "panoptic"]):
        m2f.main([*map(str, Path().glob("*.*g")), "--weights", "w", "--out", f"out{len(task)}", *task])
    assert "3000 x 20" in capsys.readouterr().out
    sizes = sorted(Image.open(path).size for path in Path("out0").iterdir())
    assert sizes == [(320, 640), *4 * [(640, 640)], (1333, 9)]
    before = Image.open("RGB.png").resize((640, 640), Image.BICUBIC)  # every pixel is tinted
    assert (np.asarray(before) != np.asarray(Image.open("out0/RGB.png"))).any(2).mean() > 0.9
    grey = np.arange(0, 65536, 1024).reshape(8, 8)
    for dtype in (np.uint16, np.int32):  # 16 bits are scaled, not clipped
        assert (np.asarray(m2f.rgb(Image.fromarray(grey.astype(dtype)))) == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("spoil, call, words", [
    (("w/model.safetensors", b"decoder", b""), [], "model.safetensors: not a complete safetensors file"),
    (("w/model.safetensors", b"Mask2Former", b"MaskXFormer"), [], "weights of a MaskXFormer"),
    (("w/model.safetensors", b"decoder.level", b"decoder.lever"), [], "decoder.level"),
    (None, ["--weights", "P.png"], "P.png: not a safetensors file"),
    (None, ["--weights", "none"], "none: no such file"),
    (("config.json", b"}", b""), ["--weights", "hub.safetensors"], "config.json: not JSON"),
    (("config.json", b"0", b"1"), ["--weights", "hub.safetensors"], "pre_norm is 1"),
    (("config.json", b"gelu", b"relu"), ["--weights", "hub.safetensors"], "hidden_act is relu"),
    (("config.json", b"96", b"95"), ["--weights", "hub.safetensors"], "Known are swin_t"),
    (("L.png", b"PNG", b"no"), [], "L.png: not a readable image"),
    (None, ["--device", "foo"], "foo: no such device"),
    (None, ["--out", "P.png"], "P.png"),
    (None, ["--out", "."], "Choose another folder"),
    (None, ["b/L.jpg"], "Choose another folder"),
    (None, lambda: m2f.hungarian(np.zeros((1, 3, 2))), "3 rows for 2 columns"),
    (None, lambda: m2f.hungarian(np.array([[[1.0, np.nan]]])), "finite"),
    (None, lambda: m2f.targets(np.full((2, 2), 9), None, TOY["isthing"], "panoptic"), "class id 9"),
    (None, lambda: m2f.predict(toy_model(), torch.rand(3, 32, 32), "dance"), "dance: no such task"),
    (None, lambda: m2f.predict(toy_model(), torch.rand(3, 32, 32), "instance", flip=True), "scales"),
    (None, lambda: m2f.Mask2Former(3, backbone="swin_x"), "swin_x: no such backbone")])
def test_a_mistake_ends_in_one_line_and_writes_nothing(desk, spoil, call, words):
    file, old, new = spoil or ("L.png", b"", b"")
    Path(file).write_bytes(Path(file).read_bytes().replace(old, new))
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as error:
        m2f.run(call if callable(call) else lambda: m2f.main(["--weights=w", "--out", "o", *call, "L.png"]))
    assert words in error.value.code and "\n" not in error.value.code
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "resnet50", "swin_t"])
def test_mask2former_agrees_with_the_cpu(name, monkeypatch, request):
    """Rounding may open pixels of masked attention: gradients are one vector. A forward pass never waits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "rand", equal_points)
    torch.manual_seed(0)
    model, results = m2f.Mask2Former(3, **m2f.PRESETS[name] | {"points": 1024}).eval(), []
    x, truth = torch.randn(2, 3, 64, 64), [some_targets(0, 2, 2), some_targets(1)]
    for device in ("cpu", "cuda"):
        outputs = model.to(device)(x := x.to(device))
        loss, _ = model.loss(outputs, truth)
        grads = torch.cat([g.flatten().cpu() for g in torch.autograd.grad(loss, list(model.parameters()))])
        results.append((loss.item(), grads, m2f.mask_logits(outputs[-1]).detach().cpu()))
    (a, g, m), (b, h, n) = results
    assert abs(a - b) < 1e-3 * a and (m - n).abs().max() < 1e-2 * m.abs().max()
    assert F.cosine_similarity(g, h, 0) > 0.999
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    model(x)


# ---- train.py, bench/compare.py, bench/camvid.py -----------------------------------------------------------


SEGMENTER = SHIPPED / "mask2former"


def train_on(pairs, out, flags, **changes):
    """What `python train.py` with these flags trains on real pairs; changes: of the settings."""
    args = T.parse(T.flags(), ["--device", "cpu", *flags.split()])
    return T.train_segmenter(args, T.settings(args, pairs, []) | changes, pairs, [], out)


def add_mistakes(ids, instances, isthing, rng):
    """The maps of a pair -> (prediction, truth): void and a crowd are added, and all kinds of mistakes."""
    first, second = np.flatnonzero(isthing)[:2] + 1
    ids[:9, :14] = 0
    ids[-12:, :20], instances[-12:, :20] = first, CROWD
    shift = rng.integers(-2, 3, 2)
    found, numbers = (np.roll(part, shift, (0, 1)).astype(np.int64) for part in (ids, instances))
    found[found == rng.choice(found.ravel())] = second
    numbers[numbers == 2] = 1
    found[20:26, 20:40] = 0
    if rng.random() < 0.5:
        found[:9, :14], numbers[:9, :14] = second, 40  # in the void: not false
    if rng.random() < 0.7:
        found[-12:, :20], numbers[-12:, :20] = rng.choice([first, second]), 41  # false if of another class
    return (found, numbers, []), (ids, instances)


def measure(Meter, classes, cases):
    """The metric of (prediction, truth) pairs, as two ranks and one without images would measure it."""
    meters = [Meter(classes) for _ in range(3)]
    for i, case in enumerate(cases):
        meters[i % 2].add(*case)
    for other in meters[1:]:
        meters[0].merge(other)
    return meters[0].result()


def slow_miou(cases, isthing):
    """From boolean masks, class by class."""
    found, true = (np.concatenate([case[i][0].ravel() for case in cases]) for i in (0, 1))
    found, true = found[true > 0], true[true > 0]
    masks = [(found == k, true == k) for k in range(1, len(isthing) + 1)]
    hits, unions, sizes = np.array([((f & t).sum(), (f | t).sum(), t.sum()) for f, t in masks if t.any()]).T
    return {"mIoU": 100 * (hits / unions).mean(), "fwIoU": 100 * (hits / unions) @ sizes / len(true),
            "mACC": 100 * (hits / sizes).mean(), "pACC": 100 * (found == true).mean(),
            "absent": len(isthing) - len(hits)}


def slow_pq(cases, isthing):
    """From boolean masks, segment by segment, straight from the definition."""
    def masks(ids, numbers):
        keys = {(k, n * isthing[k - 1]) for k, n in zip(ids[ids > 0].tolist(), numbers[ids > 0].tolist())}
        return {(k, n): (ids == k) & ((numbers == n) | (not isthing[k - 1])) for k, n in keys}

    iou, hits, false, missed = np.zeros((4, len(isthing)))  # by class
    for prediction, (ids, instances) in cases:
        found, true, void = masks(*prediction[:2]), masks(ids, instances), ids == 0
        crowds = {key[0]: true.pop(key) for key in list(true) if key[1] == CROWD}
        for (k, _), t in true.items():
            same = {key: f for key, f in found.items() if key[0] == k}
            ious = {key: (f & t).sum() / ((f | t) & ~(f & void)).sum() for key, f in same.items()}
            partners = [key for key, value in ious.items() if value > 0.5]
            missed[k - 1] += not partners
            for key in partners:
                hits[k - 1] += 1
                iou[k - 1] += ious[key]
                del found[key]
        for (k, _), f in found.items():
            false[k - 1] += (f & (void | crowds.get(k, False))).sum() <= 0.5 * f.sum()
    total, things, result = hits + false / 2 + missed / 2, np.array(isthing), {}
    for ending, kind in (("", True), ("_things", things), ("_stuff", ~things)):
        seen = (total > 0) & kind
        result["PQ" + ending] = 100 * (iou[seen] / total[seen]).mean()
        result["SQ" + ending] = 100 * (iou[seen] / hits[seen].clip(1)).mean()
        result["RQ" + ending] = 100 * (hits[seen] / total[seen]).mean()
    return result


def check_metrics(folder, step=1):
    """Of mistakes in the first 12 pairs, at every step-th pixel: mIoU and PQ equal their slow definitions."""
    pairs, rng, cases = PairFolder(folder, limit=12), np.random.default_rng(0), []
    isthing = [c["isthing"] for c in pairs.classes]
    for pair in map(pairs.read, range(12)):
        ids, instances = (pair[part][::step, ::step].copy() for part in ("ids", "instances"))
        cases.append(add_mistakes(ids, instances, isthing, rng))
    for Meter, slow in ((T.MeanIoU, slow_miou), (T.PanopticQuality, slow_pq)):
        result = measure(Meter, pairs.classes, cases)
        assert result == pytest.approx(slow(cases, isthing)) and 5 < result[T.SCORE[Meter.task]] < 95


def test_metrics_equal_their_definitions(world):
    check_metrics(world / "train")


def cocos_ap(truth, predictions):
    """What COCO's tool says of the files that export.py writes for two pair folders -> {name: percent}."""
    for folder in (truth, predictions):
        call(export, folder)
    coco, result = COCO(truth / "coco/instances.json"), {}
    for kind, ending in (("segm", ""), ("bbox", "_box")):
        judge = COCOeval(coco, coco.loadRes(str(predictions / "coco/results.json")), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        names = "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"
        result |= {name + ending: 100 * v if v >= 0 else None for name, v in zip(names, judge.stats.tolist())}
    return result


@pytest.mark.parametrize("task, short, multi_scale, Meters", [
    ("semantic", None, True, [T.MeanIoU]), ("instance", 48, False, [T.AveragePrecision]),
    ("panoptic", None, False, [T.MeanIoU, T.AveragePrecision, T.PanopticQuality])])
def test_evaluation_equals_one_prediction_after_the_other(world, tmp_path, task, short, multi_scale, Meters):
    """Of images of two sizes, with a crowd. Of the written predictions, COCO's tool gives the same AP."""
    pair, path = PairFolder(world / "val").read(0), shutil.copytree(world / "val", tmp_path / "val")
    image, ids, instances = (pair[part][:40, :36] for part in ("image", "ids", "instances"))
    ids[-9:, :9], instances[-9:, :9] = 12, CROWD
    P.write_pair(path, "00000x", image, ids, instances, K=13)
    model, pairs, expected = m2f.load(SEGMENTER, task), PairFolder(path), {"images": 5}
    options = dict(scales=(0.5, 0.75, 1, 1.25, 1.5, 1.75), flip=True) if multi_scale else dict(short=short)
    for Meter in Meters:
        found = [T.to_arrays(*m2f.predict(model, T.to_tensor(pair["image"]) / 255, Meter.task, **options))
                 for pair in map(pairs.read, range(5))]
        true = [(pair["ids"], pair["instances"]) for pair in map(pairs.read, range(5))]
        expected |= measure(Meter, pairs.classes, zip(found, true))
    result = T.evaluate(model, pairs, task, short and (short, 192), 0, 1, multi_scale, tmp_path / "p")
    assert result == pytest.approx(expected, abs=1e-6) and result[T.SCORE[task]] > 5
    for name, maps in zip(pairs.names, found):  # of the last meter, the task's
        for part, numbers in zip(("masks", "instances")[:1 + (task != "semantic")], maps):
            assert (np.asarray(Image.open(tmp_path / f"p/{part}/{name}.png")) == numbers).all()
    if task != "semantic":
        ap = cocos_ap(path, tmp_path / "p")
        assert {name: result[name] for name in ap} == pytest.approx(ap) and 1 < ap["AP"] < 99


def test_batches_mix_real_and_synthetic_pairs(world):
    real, synth = PairFolder(world / "train", limit=4), PairFolder(world / "val")
    batches, halves = T.Batches(real, [synth]), T.Batches(real, [synth], steps=10, pretrain=True)
    torch.manual_seed(0)
    assert abs(np.mean([batches.choose(n, 0)[0] is synth for n in range(2000)]) - 0.6) < 0.04
    assert [halves.choose(n, 0)[0] is synth for n in range(10)] == [True] * 5 + [False] * 5
    ranks = [T.Batches(real, batch=2, rank=rank, world=2) for rank in range(2)]
    order = [ranks[rank].choose(n, i)[1] for n in range(8) for rank in range(2) for i in range(2)]
    passes = [tuple(order[n:n + 4]) for n in range(0, 32, 4)]  # each sees every real pair once
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes) and len(set(passes)) > 1

    def content(n, **options):
        images, truth = T.Batches(real, [synth], size=(32, 32), **options)[n]
        return images.tolist(), [{name: part.tolist() for name, part in target.items()} for target in truth]
    assert content(3) == content(3) and content(3) != content(4)  # a function of number, seed and rank
    assert content(3) != content(3, seed=1) and content(3) != content(3, rank=1, world=2)
    assert "valid" in content(0)[1][0] and "valid" not in content(0, recipe="coco")[1][0]


@pytest.mark.parametrize("recipe", ["tiny", "ade20k", "coco"])
def test_image_and_maps_are_augmented_together(recipe):
    """A picture of two reddish greys, one for each class: colours change, and red stays the strongest."""
    ids, instances = (np.roll(part, 9, 1) for part in touching_things(48, 48))
    ids = 3 * ids - 2  # 1 and 4: a blend would be neither
    image = tv_tensors.Image(torch.tensor(np.stack([30 * ids + 30, 30 * ids, 30 * ids])))
    maps, shades = tv_tensors.Mask(torch.tensor(np.stack([ids, instances]))), set()
    torch.manual_seed(0)
    for _ in range(10):
        found, labels = T.augmentation(recipe, 64, 32)(image, maps)
        inside, (dark, bright) = labels[0] > 0, (found[1, labels[0] == k].float() for k in (1, 4))
        red, green, blue = found[:, inside].float().sum(1)
        assert found.shape[1:] == labels.shape[1:] == (64, 32) and red > max(green, blue)
        assert set(labels[0].unique().tolist()) <= {0, 1, 4} and set(labels[1].unique().tolist()) <= {0, 1, 2}
        if min(len(dark), len(bright)) > 100:
            middle = (dark.median() + bright.median()) / 2
            assert (dark < middle).float().mean() > 0.75 and (bright > middle).float().mean() > 0.75
            shades.add(dark.median().item())
        assert recipe != "coco" or (found[0, ~inside] == 128).float().mean() > 0.6 or inside.all()
    assert len(shades) > 3 if recipe != "coco" else shades == {30}


@pytest.mark.parametrize("flags, ranks, size, sides, batch", [
    ("--batch 3 --accumulate 2", 4, [48, 48], None, 3), ("--size 64x48", 1, (48, 64), (48, 192), 8),
    ("--recipe ade20k", 8, (512, 512), (512, 2048), 2),
    ("--recipe coco --size 512 --accumulate 4", 2, (512, 512), (800, 1333), 2),
    ("--recipe coco --accumulate 4", 16, (1024, 1024), (800, 1333), 1)])
def test_sizes_and_batch_of_the_recipes(tmp_path, flags, ranks, size, sides, batch):
    args = T.parse(T.flags(), flags.split())
    args.world = ranks
    cfg = T.settings(args, one_pair(tmp_path, *touching_things(40, 40)), [])
    assert (cfg["size"], args.sides, cfg["batch"]) == (size, sides, batch)
    assert T.augmentation("coco", 64, 32).transforms[1].target_size == (32, 64)  # torchvision's (W, H)


def test_help_shows_the_recipes(capsys):
    with pytest.raises(SystemExit):
        T.main(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "tiny: preset tiny, steps 1000, batch 8" in text and "coco: preset resnet50, steps 368750" in text


def test_optimiser_and_schedules_are_the_originals():
    """Decay 0.05 but on norms, embeddings and Swin's bias tables; the backbone at a tenth; the rates."""
    model = m2f.Mask2Former(3, "swin_t", queries=4, encoder_layers=1, decoder_layers=1)
    groups = T.make_optimiser(model, 1e-4).param_groups
    assert all(group["lr"] == 1e-4 and group["betas"] == (0.9, 0.999) for group in groups)
    rates = {id(p): (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    fixed = r"norm|inputs\.\d\.1|lateral\.1|smooth\.1|features\.0\.2|_table|^decoder\.(queries|places|level)$"
    for name, p in model.named_parameters():
        decay, scale = 0 if re.search(fixed, name) else 0.05, 0.1 if name.startswith("backbone.") else 1
        assert rates[id(p)] == (decay, scale), name
    for name, shares in (("coco", {0: 1, 327_777: 1, 327_778: 0.1, 355_091: 0.1, 355_092: 0.01}),
                         ("ade20k", {0: 1, 80_000: 0.5 ** 0.9, 159_999: (1 / 160_000) ** 0.9})):
        recipe = T.RECIPES[name]
        assert (recipe["clip"], recipe["batch"], recipe["lr"]) == (0.01, 16, 1e-4)
        for step, share in shares.items():
            assert T.rate(recipe["schedule"], step, recipe["steps"], recipe["warmup"]) == pytest.approx(share)


def test_accumulation_equals_one_batch(world, monkeypatch):
    """Mask and dice losses at the same points. The class loss, a mean over what a call sees, is left out."""
    torch.manual_seed(0)
    model, results = m2f.Mask2Former(13, **dict(m2f.PRESETS["tiny"], queries=12, class_weight=0.0)), []
    images, truth = T.Batches(PairFolder(world / "train"), batch=3, task="panoptic")[0]
    assert len({len(target["labels"]) for target in truth}) > 1  # unequally many masks
    points = torch.rand(4096, 2)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: points[:size[-2]].expand(size).clone())
    for batches in ([(images, truth)], [(images[i:i + 1], truth[i:i + 1]) for i in range(3)]):
        model.zero_grad()
        loss = T.step_gradients(model, model.loss, batches, torch.device("cpu"))
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (other_loss, other) = results
    assert loss == pytest.approx(other_loss, rel=1e-4) and (gradient - other).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("task, judge, least", [
    ("semantic", "semantic", 6), ("panoptic", "semantic", 6), ("instance", "instance", 1)])
def test_eight_images_are_learned(world, tmp_path, task, judge, least):
    pairs = PairFolder(world / "train", limit=8)
    before = T.evaluate(T.build(pairs.classes, task), pairs, judge, (32, 128))[T.SCORE[judge]]
    model = train_on(pairs, tmp_path, f"--task {task} --size 32 --steps 40 --batch 4", save_every=10)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    after = T.evaluate(model, pairs, judge, (32, 128))[T.SCORE[judge]]
    assert losses[-1] < 0.8 * losses[0] and after > before + least, (losses, before, after)


@pytest.mark.parametrize("void", [False, True])
def test_nan_stops_a_training_and_keeps_the_last_state(tmp_path, monkeypatch, void):
    pairs = one_pair(tmp_path / "p", *(part * (not void) for part in touching_things()))
    save, out = diffusion.RunFolder.save, tmp_path / "o"

    def save_and_spoil(run, step):
        save(run, step)
        if step == 2:
            run.parts["model"].decoder.classes.weight.data.fill_(torch.nan)
    monkeypatch.setattr(diffusion.RunFolder, "save", save_and_spoil)
    with pytest.raises(ValueError, match="not finite at step 3" if void else "finite"):
        train_on(pairs, out, "--steps 4 --batch 2 --task panoptic", save_every=1)
    state, model = torch.load(out / "state.pt", weights_only=True), m2f.load(out)
    tensors = *state["model"].values(), *model.state_dict().values()
    assert state["step"] == 2 and all(t.isfinite().all() for t in tensors)
    result = T.evaluate(model, pairs, "panoptic")
    assert [result[score] is None for score in ("PQ", "AP", "mIoU")] == [void] * 3


def test_classes_of_a_checkpoint(tmp_path):
    """They must be those of the data, but for spelling; or get a new head; or be the things of the data."""
    classes = [dict(name=name, isthing=name in ("ball", "box")) for name in ("sky", "grass", "ball", "box")]
    m2f.save(T.build(classes), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="class 4 is box, where missing was expected"):
        T.build(classes[:3], init=tmp_path)
    model = T.build(classes[:3], seed=1, init=tmp_path, new_head=True)
    assert model.config["class_names"] == ["sky", "grass", "ball"] and model.decoder.classes.out_features == 4
    assert torch.equal(model.decoder.queries, m2f.load(tmp_path).decoder.queries)
    other = [dict(c, name=name) for c, name in zip(classes, ("Sky", "grass, lawn", "ball", "b-o_x"))]
    with pytest.raises(ValueError, match="class 4 is box, where b o x was expected"):
        T.build(other, init=tmp_path)
    other[3]["name"] = "box"
    assert T.build(other, init=tmp_path).config["class_names"] == ["Sky", "grass, lawn", "ball", "box"]
    m2f.save(T.build(classes[2:], "instance"), tmp_path / "model.safetensors")
    models = m2f.load(tmp_path), T.build(classes, "instance", init=tmp_path).eval()
    known, found = (model(torch.ones(1, 3, 32, 32))[-1]["class_logits"].softmax(-1) for model in models)
    assert torch.allclose(known, found[..., 2:], atol=1e-6) and found[..., :2].max() == 0
    with pytest.raises(ValueError, match="class 1 is ball, where sky was expected .2 classes instead of 4"):
        T.build(classes, "panoptic", init=tmp_path)


def test_train_then_evaluate_other_folders(world, tmp_path, capsys):
    flags = "--data", world, "--device", "cpu", "--out", tmp_path / "o", "--task"
    call(T, *flags, "panoptic", "--init", SEGMENTER, "--steps", 1, "--batch", 1, "--lr", 1e-9)
    assert P.read_json(tmp_path / "o/metrics.json")["val"]["PQ"] > 20
    assert Image.open(tmp_path / "o/samples.png").width > 300
    mine = shutil.copytree(world / "val", tmp_path / "mine")
    call(T, *flags, "panoptic", "--eval-only", "--eval-pairs", mine, "--predictions", tmp_path / "p")
    text = capsys.readouterr().out
    assert f"weights: {tmp_path / 'o'}" in text and "PQ is 1.000 of val's" in text
    first, second = snapshot(tmp_path / "p/val"), snapshot(tmp_path / "p/mine")
    assert first == second and len(first) == 1 + 3 * 4  # classes.json, and three files for each
    call(T, *flags, "semantic", "--eval-only", "--multi-scale")
    expected = T.evaluate(m2f.load(tmp_path / "o", "semantic"), PairFolder(mine), multi_scale=True)
    assert T.format_metrics("val", expected) in capsys.readouterr().out


# What is spoiled in world/ or beside it, the flags of train.py or bench/compare.py, words of the message.
@pytest.mark.parametrize("spoil, flags, words", [
    (lambda: Path("world", IMAGE).write_bytes(b"no picture"), "", "00000.png: not a readable picture"),
    (classes("val", "fog"), "", "val: class 1 is fog, where sky was expected"),
    (classes("train", "sky"), "--task instance", "train: instance segmentation needs"),
    (lambda: shutil.rmtree("world/val/instances"), "--task panoptic", "val: panoptic segmentation needs"),
    (lambda: shutil.rmtree("world/val"), "", "no val/, unseen/ or test/"),
    (lambda: Path("x.safetensors").write_bytes(b"\x80\x04"), "--init x.safetensors", "x.safetensors"),
    (lambda: os.makedirs("p/val"), "--eval-only --init x --predictions p", "p/val: exists"),
    (None, "--eval-only --init x --predictions p --eval-pairs world/val", "p/val: exists, or two sets"),
    (None, "--eval-only", "no such file. Train a segmenter"),
    (None, "--pretrain", "--pretrain begins with synthetic pairs, but there are none"),
    (None, "--pretrain --p-synth 0.5", "--p-synth has no effect with --pretrain. Give one of them"),
    (None, "--new-head", "--new-head has no effect without --init. Give both of them"),
    (None, "--init x --preset swin_t", "--preset has no effect with --init"),
    (None, "--eval-only --steps 7", "--steps has no effect with --eval-only"),
    (None, "--predictions x", "--predictions has no effect without --eval-only"),
    (None, f"--eval-only --multi-scale --task panoptic --init {SEGMENTER}", "panoptic segmentation has none"),
    (None, "compare --protocol ../x", "a name is needed, not a path"),
    (None, "compare --arms masksyn", "masksyn: no such arm. There are: real"),
    (None, "compare --synth world/val world/val", "another folder of --synth has this name")])
def test_a_mistake_of_a_training_ends_in_one_line(world, tmp_path, monkeypatch, spoil, flags, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, "world")
    if spoil:
        spoil()
    before, module = snapshot("."), C if flags.startswith("compare") else T
    flags = flags.removeprefix("compare").split()
    assert words in mistake(module, "--data", "world", "--out", "out", *flags) and snapshot(".") == before


def test_missing_synthetic_pairs_come_from_a_process_outside_the_group(tmp_path, monkeypatch):
    (tmp_path / "masksyn.py").write_text("""if True:
        import os, pathlib, sys
        folder = pathlib.Path(sys.argv[2])
        (folder / "images").mkdir(parents=True)
        (folder / "environment").write_text(" ".join(os.environ))
        for n in range(int(sys.argv[4])):
            (folder / f"images/{n}.png").touch()""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "ROOT", tmp_path)
    monkeypatch.setattr(T, "PAIRS", 3)
    args = SimpleNamespace(synth=None, data="shapes", rank=0, world=1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PASSED_ON"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="imgsyn: could not be made"):  # there is no imgsyn.py
        T.synthetic_folders(args)
    shutil.copy("masksyn.py", "imgsyn.py")
    assert T.synthetic_folders(args) == [Path("out/shapes/masksyn"), Path("out/shapes/imgsyn")]
    names = Path("out/shapes/imgsyn/environment").read_text().split()
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "PASSED_ON"} & set(names) == {"PASSED_ON"}
    assert len(os.listdir("out/shapes/imgsyn/images")) == 3
    args.synth = []
    assert T.synthetic_folders(args) == []


def test_compare_writes_a_table_shares_runs_and_goes_on(world, tmp_path, monkeypatch):
    synth = [shutil.copytree(world / "val", tmp_path / name) for name in ("masksyn", "imgsyn")]
    flags, runs = "--limit-real 4 --seeds 0 1 --steps 2 --batch 2 --size 32 --device cpu".split(), []
    monkeypatch.setattr(C, "train_segmenter", lambda *a: runs.append(a[-1].name) or T.train_segmenter(*a))

    def compare(*more):
        runs.clear()
        call(C, "--data", world, "--synth", *synth, *flags, "--out", tmp_path / "c", *more)
        return [name.split("_seed")[0] for name in runs]
    assert compare("--arms", "REAL", "oracle") == ["real_only", "oracle"] * 2
    assert compare("--protocol", "same 100") == ["masksyn", "imgsyn", "both"] * 2
    table = P.read_json(tmp_path / "c/same 100.json")
    assert list(table["arms"]) == ["real only", "+ MaskSyn", "+ ImgSyn", "+ both", "oracle"]
    both, real = (table["runs"][arm]["1"]["val"]["mIoU"] for arm in ("+ both", "real only"))
    assert table["arms"]["+ both"]["val"]["gain"]["1"] == pytest.approx(both - real)
    assert "| oracle |" in (tmp_path / "c/same 100.md").read_text()
    assert Image.open(tmp_path / "c/same 100.png").height > 7 * 128
    shutil.copytree(world / "train", synth[1], dirs_exist_ok=True)  # other pairs: other runs
    assert compare("--protocol", "other", "--seeds", 1) == ["imgsyn", "both"]
    for oracle, share in ((50, None), (54, 0.25)):  # an oracle without gain has no share
        scores = {"real only": 50, "+ MaskSyn": 51, "oracle": oracle}
        results = {arm: {0: {"val": {"mIoU": score}}} for arm, score in scores.items()}
        assert C.summarise(results, "+ MaskSyn", "val", "mIoU")["share"] == share


def test_camvids_benchmark_trains_both(world, tmp_path):
    call(bench_camvid, "--data", world, "--steps", 2, "--batch", 2, "--size", 32, "--out", tmp_path)
    results = [P.read_json(tmp_path / f"{name}.json") for name in ("tiny", "unet")]
    assert all(result["steps"] == 2 and 0 < result["val"]["mIoU"] < 100 for result in results)


@pytest.mark.real
def test_the_coco_sample_trains_and_cocos_tools_read_its_predictions(tmp_path):
    from data.coco import prepare
    call(prepare, "--root", SAMPLES / "coco", "--out", tmp_path)
    check_metrics(tmp_path / "val", step=4)
    train, val = (PairFolder(tmp_path / split, limit=4) for split in ("train", "val"))
    model = train_on(train, tmp_path / "o", "--task panoptic --size 64 --steps 2 --batch 2")
    result = T.evaluate(model, val, "panoptic", (64, 256), folder=tmp_path / "p")
    assert result["images"] == 4 and 0 <= result["PQ"] < 50
    call(export, tmp_path / "p")
    results = COCO(tmp_path / "p/coco/instances.json").loadRes(str(tmp_path / "p/coco/results.json"))
    assert len({one["score"] for one in results.anns.values()}) > 10


@pytest.mark.real
def test_the_ade20k_sample_trains_by_the_papers_recipe(tmp_path):
    from data.ade20k import prepare
    call(prepare, "--root", SAMPLES / "ADEChallengeData2016", "--out", tmp_path / "ade", "--size", 64)
    flags = "--recipe ade20k --preset tiny --size 64 --steps 2 --batch 2 --device cpu".split()
    call(T, "--data", tmp_path / "ade", *flags, "--out", tmp_path / "o")
    result = P.read_json(tmp_path / "o/metrics.json")["val"]
    assert result["images"] == 3 and 100 < result["absent"] < 150 and 0 <= result["mIoU"] < 50


@pytest.mark.slow
@pytest.mark.real
def test_tiny_overfits_eight_images_of_camvid(tmp_path, monkeypatch):
    from data.camvid import prepare
    call(prepare, "--root", SAMPLES / "camvid", "--out", tmp_path / "camvid")
    fill = {tv_tensors.Image: 128, tv_tensors.Mask: 0}
    monkeypatch.setattr(T, "augmentation", lambda recipe, h, w: v2.RandomCrop((h, w), None, True, fill))
    pairs = PairFolder(tmp_path / "camvid/train", limit=8)
    assert T.evaluate(train_on(pairs, tmp_path / "o", "--steps 1800 --batch 2"), pairs)["mIoU"] > 95


SAMPLES = Path(os.environ.get("SEGGEN_TEST_DATA", ""))


# ---- data/shapes -------------------------------------------------------------------------------------------

def test_shapes_are_pair_folders_of_one_world(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 8, "val": 4, "unseen": 3})
    call(shapes, "--out", tmp_path, "--size", 32, "--limit-train", 5, "--unlabelled", 2)
    for split, count in (("train", 5), ("val", 4), ("unseen", 3)):
        pairs = PairFolder(tmp_path / split)
        assert [c["name"] for c in pairs.classes] == shapes.CLASSES and len(pairs) == count
        assert P.read_json(tmp_path / split / "words.json").keys() == set(shapes.CLASSES)
        for i in range(count):
            assert pairs.read(i)["image"].shape == (32, 32, 3) and len(pairs.captions(i)) == 3
    assert len(PairFolder(tmp_path / "unlabelled", parts=("image",))) == 2
    P.unfinished(tmp_path / "unseen").touch()  # killed between its last scene and the end
    call(shapes, "--out", tmp_path, "--size", 32, "--limit-train", 5)
    before = snapshot(tmp_path)
    for flags, words in ((["--size=48"], "another size"), (["--size=32", "--seed=1"], "another seed"),
                         (["--size=32", "--limit-train=3"], "5 scenes, more than 3")):
        assert words in mistake(shapes, "--out", tmp_path, *flags) and snapshot(tmp_path) == before


@pytest.mark.parametrize("style", ["day", "night", "fog", "ink"])
def test_captions_masks_and_instances_of_shapes_agree(style):
    counts = 0
    for i in range(20):
        scene = shapes.scene(np.random.default_rng((8, i)), 64, style)
        mask, instances, first = scene["mask"], scene["instances"], scene["captions"][0]
        area = {name: (mask == k).sum() for k, name in enumerate(shapes.CLASSES, 1)}
        things = np.isin(mask, [shapes.CLASSES.index(name) + 1 for name in shapes.THINGS])
        assert area["sky"] > 0 and mask.min() > 0 and ((instances > 0) == things).all()
        assert all(len(np.unique(mask[instances == k])) == 1 for k in range(1, instances.max() + 1))
        for caption in scene["captions"]:
            words = set(re.findall("[a-z]+", caption))
            named = {name for name in shapes.CLASSES if words & set(shapes.WORDS[name])}
            assert named and all(area[name] >= 12 for name in named), caption
            assert len(caption.encode()) <= 110 and caption.strip() == caption
  # The first names all things, but for those of a few specks.
            assert caption != first or all(name in named for name in shapes.THINGS if area[name] >= 48)
        for word, noun in re.findall(r"\b(two|three|four)(?: \w+)? (house|tree|boat)s\b", first):
            sizes = np.bincount(instances[mask == shapes.CLASSES.index(noun) + 1])
            assert (sizes >= 12).sum() == {"two": 2, "three": 3, "four": 4}[word], first
            counts += 1
    small, large = (shapes.scene(np.random.default_rng(8), size, style)["mask"] for size in (32, 96))
    assert counts > 2 and (small == large[1::3, 1::3]).mean() > .95  # one geometry, two resolutions


# ---- data/camvid, data/ade20k, data/coco -------------------------------------------------------------------

def raw_camvid(root):
    for name, noise in enumerate(np.random.default_rng(0).integers(0, 252, (6, 18, 24, 4), np.uint8)):
        split = "train" if name < 3 else "val"
        P.write_picture(root / split / f"{name}.png", noise[..., :3].copy())
        P.write_picture(root / f"{split}annot/{name}.png", noise[..., 3] % 12)
    return root


def raw_ade(root):
    label, marked = np.zeros((20, 30), np.uint8), np.zeros((20, 30, 3), np.uint8)
    label[:10], label[10:, :20] = 1, 8  # wall and beds
    marked[5:15, :8], marked[10:15, 10:15] = (1, 7, 0), (1, 255, 0)  # two beds, one half over the wall
    for i, part in enumerate(("training", "training", "validation")):
        P.write_picture(root / "images" / part / f"{i}.jpg", np.zeros_like(marked))
        P.write_picture(root / "annotations" / part / f"{i}.png", label * (i != 1))  # 1 is blank
        P.write_picture(root / "annotations_instance" / part / f"{i}.png", marked)
    names = [f"{k}\t0.1\t1\t1\tclass{k}, other name" for k in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]))
    (root / "sceneCategories.txt").write_bytes(b"0 living_room\n2 \xff\n")
    return root


PANOPTIC, PNGS = "annotations/panoptic_val2017.json", "annotations/panoptic_val2017"
# Segments (id, category, crowd, top, bottom, left, right): category 200 is stuff, the others are things.
FEW = (300, 3, 0, 0, 9, 0, 9), (70000, 3, 0, 0, 9, 9, 30), (5, 3, 1, 10, 20, 0, 9), (9, 200, 0, 20, 40, 0, 50)
MANY = [(50 * i + j, 3 if i < 7 else 90, 0, i, i + 1, j, j + 1) for i in range(1, 9) for j in range(50)]


def raw_coco(root, pngs=PNGS, segments=FEW):
    code, info = np.zeros((40, 50, 1), np.int64), []
    for number, category, crowd, top, bottom, left, right in segments:
        code[top:bottom, left:right], width, height = number, right - left, bottom - top
        info.append({"id": number, "category_id": category, "iscrowd": crowd, "area": width * height,
                     "bbox": [left, top, width, height]})
    for i in (7, 8):
        P.write_picture(root / pngs / f"00{i}.png", (code >> [0, 8, 16]).astype(np.uint8))
        P.write_picture(root / f"val2017/00{i}.jpg", np.zeros((40, 50, 3), np.uint8))
    categories = [(200, "rug-merged", 0), (3, "car", 1), (90, "toothbrush", 1)]
    P.write_json(root / PANOPTIC, {
        "images": [{"id": i, "file_name": f"00{i}.jpg"} for i in (7, 8)],
        "annotations": [{"image_id": i, "file_name": f"00{i}.png", "segments_info": info} for i in (7, 8)],
        "categories": [{"id": k, "name": name, "isthing": isthing} for k, name, isthing in categories]})
    return root


RAW = {camvid: raw_camvid, ade: raw_ade, coco: raw_coco}
ADE_PNG, ADE_INSTANCES = "annotations/training/0.png", "annotations_instance/training/0.png"


@pytest.mark.parametrize("script, path, content, words", [
    (camvid, ".", None, "Give SegNet's"), (camvid, "trainannot", None, "trainannot: 0 is missing"),
    (camvid, "trainannot/0.png", Image.new("L", (9, 9)), "24 x 18 pixels, its mask 9 x 9"),
    (camvid, "trainannot/0.png", Image.new("L", (24, 18), 12), "holds the id 12, where 0 to 11"),
    (camvid, "train/0.png", "cut", "train/0.png: not a readable"), (ade, ADE_PNG, None, "0 is missing"),
    (ade, "objectInfo150.txt", None, "objectInfo150.txt: no such file. Give the folder ADEChallengeData2016"),
    (ade, "objectInfo150.txt", "Idx\n1\t0\t0\t0\twall\n", "1 classes"),
    (ade, ADE_PNG, Image.new("L", (9, 9), 151), "id 151"), (ade, ADE_PNG, Image.new("L", (9, 9)), "not RGB"),
    (ade, ADE_INSTANCES, None, "0 is missing"), (ade, ADE_INSTANCES, Image.new("L", (30, 20)), "mode L"),
    (ade, ADE_INSTANCES, Image.new("RGB", (30, 20), (101, 1, 0)), "holds the class 101"),
    (coco, "annotations", None, "no panoptic_train2017.json"), (coco, PANOPTIC, "{", "not a JSON file"),
    (coco, PANOPTIC, ("300", "7"), "lacks the segment 7"), (coco, PANOPTIC, ('d": 5', 'd": 9'), "segment 5"),
    (coco, PANOPTIC, ('"category_id": 200', '"category_id": 4'), "the unknown category 4"),
    (coco, PANOPTIC, ('"image_id": 7', '"image_id": 8'), "image 7 lacks an annotation"),
    (coco, PANOPTIC, ('"id": 7,', '"id": 9,'), "image 7 lacks an image"),
    (coco, PNGS + "/007.png", None, "missing"), (coco, PNGS + "/007.png", Image.new("L", (9, 9)), "mode L"),
    (coco, "val2017", None, "val2017: no such folder"), (coco, "val2017/007.jpg", None, "7.jpg is missing")])
def test_spoiled_raw_data_is_refused_in_one_line(tmp_path, script, path, content, words):
    spoil(RAW[script](tmp_path / "raw") / path, content)
    out = tmp_path / "out"
    assert words in mistake(script, "--root", tmp_path / "raw", "--out", out)
    images, masks = ({file.stem for file in out.glob(f"*/{kind}/*")} for kind in ("images", "masks"))
    assert images == masks and not list(out.rglob(".tmp*")) # an image means a complete pair ...
    assert not list(out.glob("*/classes.json"))  # ... and no reader takes them for the set


@pytest.mark.parametrize("script, flag, size", [(camvid, "9x7", (9, 7)), (ade, 6, (9, 6)), (coco, 6, (8, 6))])
def test_masks_are_resized_by_nearest_and_sizes_are_not_mixed(tmp_path, script, flag, size):
    raw, full, out = RAW[script](tmp_path / "raw"), tmp_path / "full", tmp_path / "out"
    call(script, "--root", raw, "--out", full)
    call(script, "--root", raw, "--out", out, "--size", flag)
    before = snapshot(out)
    for path in full.glob("*/*/*.[pj][np]g"):
        small = Image.open((out / path.relative_to(full)).with_suffix(".png"))
        nearest = np.asarray(Image.open(path).resize(size, Image.NEAREST))
        assert small.size == size and path.is_symlink() == (path.parent.name == "images")
        assert path.is_symlink() or (np.asarray(small) == nearest).all()
    for other in (["--size", 12], []):
        assert "prepared at another size" in mistake(script, "--root", raw, "--out", out, *other)
    assert snapshot(out) == before
    (out / "val/classes.json").write_text('[{"name": "cat"}]')
    assert "lists other classes" in mistake(script, "--root", raw, "--out", out, "--size", flag)


@pytest.mark.parametrize("script, at, words", [
    (camvid, "val/images/4.png", "images: 4 is missing"), (shapes, "val/images/00001.png", "only a part"),
    (camvid, "train/classes.json", "classes.json: no such file")])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, script, at, words):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 8, "val": 4, "unseen": 3})
    args = ["--unlabelled", 3] if script == shapes else ["--root", raw_camvid(tmp_path / "raw")]
    def run(replace=os.replace):
        def kill(source, path):
            if str(path).endswith(at):
                os.killpg(0, signal.SIGKILL)
            replace(source, path)
        os.setsid()
        os.replace, os.cpu_count = kill, lambda: 1  # one worker, so one order
        call(script, *args, "--size", 32, "--out", tmp_path / "out")

    killed = multiprocessing.get_context("fork").Process(target=run)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and list(tmp_path.glob("out/**/.tmp*"))
    with pytest.raises(ValueError, match=words):  # no reader takes a part for the set
        PairFolder(tmp_path / "out/val")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/images/[!.]*")}
    for out in ("calm", "out"):
        call(script, *args, "--size", 32, "--out", tmp_path / out)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "calm")
    assert len(times) > 3 and all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("command", ["ade20k/prepare.py --root", "camvid/prepare.py --root", "coco/export.py",
                                     "coco/prepare.py --root", "shapes/prepare.py --out"])
def test_scripts_run_from_anywhere_and_end_in_one_line(tmp_path, command):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("raise ImportError('a foreign package called data')")
    command = f"{sys.executable} {P.ROOT}/data/{command} data/__init__.py/x".split()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "py/x" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_camvid_labels_are_shifted_and_captions_name_what_is_there(tmp_path):
    raw = raw_camvid(tmp_path / "raw")
    P.write_picture(raw / "trainannot/1.png", np.repeat(np.uint8([[5], [8]]), 9, 0).repeat(24, 1))
    P.write_picture(raw / "valannot/3.png", np.full((18, 24), 11, np.uint8))  # all void ...
    P.write_picture(raw / "val/3.png", np.zeros((18, 24, 3), np.uint8))  # ... by night
    call(camvid, "--root", raw, "--out", tmp_path)
    pairs, val = PairFolder(tmp_path / "train"), PairFolder(tmp_path / "val")
    assert [c["source_id"] for c in pairs.classes] == list(range(11)) and pairs.classes[8]["name"] == "car"
    assert not pairs.has_instances and not any(c["isthing"] for c in pairs.classes)
    assert P.read_json(tmp_path / "train/words.json").keys() == {c["name"] for c in pairs.classes}
    for i in range(3):
        label = np.asarray(Image.open(raw / f"trainannot/{i}.png"))
        assert (pairs.read(i)["ids"] == (label + 1) % 12).all() and len(set(pairs.captions(i))) == 3
    first = pairs.captions(1)[0]  # trees over cars
    assert "many trees" in first and "cars" in first and "without sky" in first
    assert "road" in pairs.captions(0)[0] and not re.search("road|pedestrian|pole|building", first)
    dark, light = (" ".join(val.captions(i)) for i in (0, 1))
    assert "at dusk" in dark and "daylight" not in dark and "daylight" in light and "at dusk" not in light


@pytest.mark.parametrize("instances", [True, False])
def test_ade_instances_agree_with_the_mask_and_captions_may_come_from_a_file(tmp_path, instances, capsys):
    raw, captions = raw_ade(tmp_path / "raw"), tmp_path / "captions.json"
    if not instances:
        shutil.rmtree(raw / "annotations_instance")
    call(ade, "--root", raw, "--out", tmp_path)
    pairs = PairFolder(tmp_path / "train")
    assert pairs.classes[0] == {"name": "class1", "isthing": False, "source_id": 1}
    assert len(pairs.classes) == 150 and sum(c["isthing"] for c in pairs.classes) == 100 * instances
    expected, pair, blank = np.zeros((20, 30)), pairs.read(0), pairs.read(1)
    expected[10:, :20], expected[10:15, :8], expected[10:15, 10:15] = 255, 1, 2
    assert pairs.has_instances == instances and (pair["instances"] == expected * instances).all()
    assert (pair["ids"] == np.asarray(Image.open(raw / ADE_PNG))).all() and not blank["ids"].any()
    assert pairs.captions(0)[0] == "a living room with class1 and a class8"  # no article before stuff
    assert pairs.captions(1) == ["a scene"] * 2
    captions.write_text('{"0": "twin beds", "1.jpg": ["a", "b"]}')
    call(ade, "--root", raw, "--out", tmp_path, "--captions", captions)
    assert "val: 1 of 1 images lack a caption" in capsys.readouterr().out
    assert pairs.captions(0) == ["twin beds"] and pairs.captions(1) == ["a", "b"]


def test_coco_things_are_numbered_by_size_and_crowds_are_255(tmp_path):
    raw = raw_coco(tmp_path / "raw")
    call(coco, "--root", raw, "--out", tmp_path)
    pairs = PairFolder(tmp_path / "val")
    assert [(c["source_id"], c["isthing"]) for c in pairs.classes] == [(3, True), (90, True), (200, False)]
    mask, instances = np.zeros((2, 40, 50))
    mask[:9, :30], mask[10:20, :9], mask[20:] = 1, 1, 3
    instances[:9, :9], instances[:9, 9:30], instances[10:20, :9] = 2, 1, 255
    assert (pairs.read(0)["ids"] == mask).all() and (pairs.read(0)["instances"] == instances).all()
    assert pairs.captions(0)[0] == "many cars with rug"
    P.write_json(raw / "annotations/captions_val2017.json", [{"image_id": 7, "id": 1, "caption": "official"}])
    call(coco, "--root", raw, "--out", tmp_path)
    assert pairs.captions(0) == ["official"]
    call(coco, "--root", raw_coco(tmp_path / "many", segments=MANY), "--out", tmp_path / "out")
    pair = PairFolder(tmp_path / "out/val").read(0)  # 300 cars and 100 toothbrushes
    cars, brushes = (pair["instances"][pair["ids"] == k] for k in (1, 2))
    assert len(np.unique(cars)) == 255 and (cars == 255).sum() == 46 and len(np.unique(brushes)) == 100


def coco_sample(root, pngs):
    (root / "annotations").mkdir(parents=True)
    for name in ("val2017", PANOPTIC, pngs):
        (root / name).symlink_to(SAMPLES / "coco" / name)
    return root


def panoptic(path, folder):
    """All that a panoptic JSON file and its PNG files say of categories and segments."""
    content = P.read_json(path)
    found = {(c["id"], c["name"], c["isthing"]) for c in content["categories"]}
    for one in content["annotations"]:
        codes = np.asarray(Image.open(folder / one["file_name"])).astype(np.int64) @ [1, 256, 65536]
        for s in one["segments_info"]:
            mask = np.packbits(codes == s["id"]).tobytes()
            found.add((one["image_id"], mask, s["category_id"], s["area"], s["iscrowd"], *s["bbox"]))
    return found


@pytest.mark.parametrize("raw, pngs", [(raw_coco, PNGS), (raw_coco, "panoptic_val2017"),
                                       pytest.param(coco_sample, PNGS, marks=pytest.mark.real)])
def test_coco_segments_come_back_and_pycocotools_reads_them(tmp_path, raw, pngs):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    root, back = raw(tmp_path / "raw", pngs), tmp_path / "back"
    call(coco, "--root", root, "--out", tmp_path)
    call(export, tmp_path / "val", "--out", back)
    assert panoptic(back / "panoptic.json", back / "panoptic") == panoptic(root / PANOPTIC, root / pngs)
    truth = COCO(back / "instances.json")
    for kind in ("segm", "bbox"):
        score = COCOeval(truth, truth.loadRes(str(back / "results.json")), kind)
        score.params.maxDets = [1, 10, 300]
        score.evaluate()
        score.accumulate()
        precision = score.eval["precision"][:, :, :, 0, -1]
        assert precision[precision > -1].min() > 0.999
    assert all(truth.annToMask(one).sum() == one["area"] for one in list(truth.anns.values())[:9])


def test_export_takes_scores_and_folders_without_images_and_a_failure_changes_nothing(tmp_path):
    call(coco, "--root", raw_coco(tmp_path / "raw"), "--out", tmp_path)
    folder = tmp_path / "val"
    call(export, folder)
    first = snapshot(folder / "coco")
    found = json.loads(first["results.json"])
    assert [one["score"] for one in found] == [1] * 4
    for path, content, words in (
            ("masks/007.png", Image.new("L", (50, 40), 4), "holds the id 4, where 0 to 3"),
            ("masks/007.png", Image.new("L", (9, 9)), "9 x 9"), ("masks", None, "masks: 007 is missing"),
            ("instances/007.png", "cut", "not a readable picture"), ("instances/007.png", None, "is missing"),
            ("images/8.jpg", "", "masks: 8 is missing"), ("classes.json", None, "json: no such file")):
        spoil(shutil.copytree(folder, tmp_path / "bad", dirs_exist_ok=True) / path, content)
        for out in ("bad/coco", "new"):
            assert words in mistake(export, tmp_path / "bad", "--out", tmp_path / out)
        assert snapshot(tmp_path / "bad/coco") == first and not (tmp_path / "new").exists()
        shutil.rmtree(tmp_path / "bad")
    shutil.rmtree(folder / "images")  # predictions have none
    P.write_json(folder / "results/008.json", [])
    assert "007.json" in mistake(export, folder)
    scored = [{"category_id": 3, "segmentation": found[0]["segmentation"], "score": s} for s in (0.9, 0.2)]
    P.write_json(folder / "results/007.json", [one | {"image_id": "007", "more": 1} for one in scored])
    call(export, folder)
    assert P.read_json(folder / "coco/results.json") == [one | {"image_id": 7} for one in scored]
    assert snapshot(folder / "coco") | {"results.json": first["results.json"]} == first
    for path in folder.glob("*/007.*"):
        path.rename(path.with_stem("A7"))  # a name that is no number
    call(export, folder)
    assert [image["id"] for image in P.read_json(folder / "coco/panoptic.json")["images"]] == ["008", "A7"]


# ---- bench/ ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [p.name for p in sorted(REPO.glob("bench/*.py")) if "__main__" in p.read_text()])
def test_benches_start_and_show_their_flags(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPO / "bench")  # as `python bench/script` does
    monkeypatch.setattr(sys, "argv", [script, "-h"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(REPO / "bench" / script), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {script}") and "--device" in text


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("script, flags, units", [
    ("vs_diffusers.py", "--what forward sample --rounds 1 --steps 2", {" s ": 2, "MB ": 2, "difference 0 ": 1}),
    ("vs_transformers.py", "--what forward --rounds 1 --sizes 64", {" s ": 1, "MB ": 1}),
    ("paper_scale.py", "--width toy --size 64 --batch 1", {" s a step ": 3, " s an image ": 2})])
def test_benches_beside_public_libraries(script, flags, units, tmp_path):
    pytest.importorskip("diffusers")
    command = [sys.executable, REPO / "bench" / script, *flags.split(), "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {unit: done.stdout.count(unit) for unit in units} == units and not list(tmp_path.iterdir())


def test_captions_name_classes_by_words_and_phrases():
    words = {"car": ["car", "cars"], "dining table": ["dining table"], "sky": ["under the sky"], "ship": ["ship"]}
    assert masks.named_classes("Two cars, a dining  table; no ships without sky.", words) == {"car", "dining table"}
    assert masks.named_classes("under the sky: a ship", words) == {"sky", "ship"}


def test_the_figures_of_a_mask_counted_by_hand():
    classes = [{"name": name, "isthing": False} for name in ("sky", "hill", "car", "pole")]
    codes = np.full((10, 20), 1, np.uint8)
    codes[5:], codes[7:, 12:] = 2, 4
    codes[0, :7] = 3  # a speck, cleaned away
    colours = encode(codes, 4).astype(float)
    colours[8:, :5] += 13  # in three channels: 22.5 grey levels
    colours[6:8, :5] += 11  # 19.1
    real = np.where(np.eye(10, 20), 3, 1).astype(np.uint8)  # ten specks of a pixel
    words = {"sky": ["sky"], "hill": ["hill"], "car": ["car", "cars"], "pole": []}
    for caption, named, painted, hits in (("A car.", 1, 1, 0), ("sky, hill", 2, 2, 2), ("cars on a hill", 2, 1, 1)):
        assert masks.judge(codes, colours, real, caption, classes, words) == pytest.approx(dict(
            off_colour=10 / 200, specks_sampled=7 / 200, specks_cleaned=0, specks_real=10 / 200,
            named=named, painted=painted, hits=hits))


def test_real_masks_obey_their_captions(world):
    pairs = PairFolder(world / "val", ("ids",))
    codes = np.stack([pairs.read(i)["ids"] for i in range(4)])
    parts = iter((codes[:3], codes[3:]))
    model = SimpleNamespace(sample=lambda *_, maps: (part := next(parts), palette(len(pairs.classes))[part] * 1.0))
    args = SimpleNamespace(batch=3, seed=0, steps=1, guidance=1.0, sampler="edm")
    figures = masks.measure(model, pairs, args)
    assert figures["specks_sampled"] == figures["specks_real"] and figures["off_colour"] == 0
    assert figures["recall"] == figures["precision"] == 100 and figures["captions"] == 4


@pytest.mark.parametrize("complete", [True, False])
def test_masks_of_the_shipped_weights(world, tmp_path, capsys, complete):
    data = shutil.copytree(world, tmp_path / "data")
    if not complete:
        (data / "val/words.json").unlink()
    masks.main(["--data", str(data), "--json", str(tmp_path / "m.json"), "--limit", "4", "--steps", "3"])
    figures, (title, *lines) = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr().out.splitlines()
    assert title == f"4 captions of {data / 'val'}" and len(lines) == len(figures) - 1
    for (key, value), line in zip(figures.items(), lines):
        printed = line.removeprefix(key.replace("_", " ")).split()[0]
        assert printed == "unknown" if value is None else float(printed) == pytest.approx(value, abs=5e-4)
    assert (figures["precision"] is None) == (not complete) and figures["recall"] > 50


@pytest.mark.parametrize("file, content, line", [
    *(("words.json", text, "words.json: not a list of words a class") for text in ("[]", '{"sky": 5}', '{"sky": [5]}')),
    ("words.json", "{", "words.json: not a JSON file"),
    ("classes.json", '[{"name": "sky"}]', "classes.json: class 2 is missing")])
def test_mistakes_end_masks_in_one_line(world, tmp_path, file, content, line):
    data = shutil.copytree(world, tmp_path / "data")
    (data / "val" / file).write_text(content)
    with pytest.raises(SystemExit) as stop:
        P.run(lambda: masks.main(["--data", str(data), "--json", str(tmp_path / "m.json")]))
    assert line in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "m.json").exists()


# ---- what the README and the docstrings promise ------------------------------------------------------------

SNIPPETS = re.findall(r"^```python\n(.*?)^```", (REPO / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_of_the_readme_runs_as_written(tmp_path, monkeypatch, snippet):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert len(snippet.splitlines()) <= 12 and len(SNIPPETS) == 3
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "samples" in names:  # of the two diffusion models
        assert names["samples"].isfinite().all() and list(tmp_path.glob("out/*/model.safetensors"))
    else:
        assert names["ids"].shape == (64, 64) and names["total"].isfinite()


FILES = ["unet", "diffusion", "mask2former", "text2mask", "train", "mask2img", "masksyn", "imgsyn", "data.pairs"]


def source(name):
    return REPO / f"{name.replace('.', '/')}.py"


def siblings(name):
    """The files that one imports, anywhere in it."""
    tree = ast.walk(ast.parse(source(name).read_text(encoding="utf-8")))
    imports = [alias.name if isinstance(node, ast.Import) else node.module
               for node in tree if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    return set(imports) & set(FILES)


def needs(name):
    """The files that one imports, and those that these import."""
    found, todo = set(), [name]
    while todo:
        new = siblings(todo.pop()) - found
        found |= new
        todo += new
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_needs_line_is_true(name):
    docstring = ast.get_docstring(ast.parse(source(name).read_text(encoding="utf-8")))
    line = re.search(r"^Needs:(.*)$", docstring, re.M).group(1)
    assert {file.replace("/", ".") for file in re.findall(r"([\w/]+)\.py", line)} == needs(name)


IMPORTS = """
import importlib, os, sys
import torch, torchvision  # once: a fork has them
for folder in sys.argv[1:]:
    if os.fork() == 0:
        sys.path.insert(0, folder)
        module = importlib.import_module(os.path.basename(folder))
        os._exit(not module.__file__.startswith(folder))
    assert os.wait()[1] == 0, folder
"""


def test_a_file_copies_with_what_it_needs(tmp_path):
    """Each in a folder of its own, with those alone that its docstring names."""
    for name in FILES:
        for each in {name} | needs(name):
            copy = tmp_path / name / source(each).relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source(each), copy)
        if (tmp_path / name / "data").is_dir():
            shutil.copy(REPO / "data" / "__init__.py", tmp_path / name / "data")
    command = [sys.executable, "-P", "-c", IMPORTS, *(str(tmp_path / name) for name in FILES)]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
