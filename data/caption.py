"""Captions for a folder of images, by a captioner of transformers in a local folder: BLIP-2, as in the paper.

ADE20K has no captions. The paper writes them with BLIP-2, one an image, and trains both generators on them.
Any image-to-text model that transformers' AutoModelForImageTextToText loads will do: BLIP, BLIP-2, GIT. The
output is what `--captions` of the prepare scripts reads. Images that the output names already are left out,
so that the same command goes on after a stop.

Paper:   SegGen (2311.03355), captions of ADE20K. The captioner: BLIP-2 (2301.12597).
Differs: the model is yours to download; nothing is fetched here.
Reads:   IMAGES/*.{jpg,jpeg,png}; MODEL, a folder that save_pretrained or `hf download` has written
Writes:  OUT, JSON {"NAME.jpg": "a caption", ...}
Needs:   data/pairs.py; transformers
Run:     hf download Salesforce/blip2-opt-2.7b --local-dir blip2
         python data/caption.py --images RAW/images/training --model blip2 --out captions.json
"""
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.pairs import FlagParser, list_files, number, open_picture, read_json, run, to_rgb, write_json

SAVE_EVERY = 500        # images
MOST_TOKENS = 40        # of a caption


def load_captioner(folder, device):
    """A local folder -> (processor, model), in bf16 on CUDA. Raises ValueError where there is none."""
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise ValueError("transformers is not installed. Install it with: pip install transformers")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no captioner, which has a config.json. Get one with: hf download "
                         "Salesforce/blip2-opt-2.7b --local-dir blip2")
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    return processor, model.to(device).eval()


@torch.inference_mode()
def caption_batch(processor, model, paths):
    """Paths of images -> their captions, the most likely words one by one (greedy)."""
    pictures = [to_rgb(open_picture(path)) for path in paths]
    inputs = processor(images=pictures, return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False, num_beams=1)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def caption_folder(images, model_folder, out, batch, device):
    """Write the captions of all images that OUT does not name yet; saved every SAVE_EVERY images."""
    paths = list(list_files(images, (".png", ".jpg", ".jpeg")).values())
    if not paths:
        raise ValueError(f"{images}: no .png or .jpg images. Give the folder that holds them")
    captions = read_json(out) if out.is_file() else {}
    if not isinstance(captions, dict):
        raise ValueError(f"{out}: not a file that this script writes. Choose another --out")
    todo = [path for path in paths if path.name not in captions]
    print(f"{images}: {len(todo)} images to caption, {len(paths) - len(todo)} are captioned already")
    if not todo:
        return
    processor, model = load_captioner(model_folder, device)
    saved = len(captions)
    for start in tqdm(range(0, len(todo), batch), "captions", unit=" batches"):
        some = todo[start:start + batch]
        texts = caption_batch(processor, model, some)
        captions |= {path.name: text for path, text in zip(some, texts)}
        if len(captions) - saved >= SAVE_EVERY:
            write_json(out, captions)
            saved = len(captions)
    write_json(out, captions)
    print(f"{out}: {len(captions)} captions. Give it to a prepare script: --captions {out}")


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images: .jpg or .png")
    parser.add_argument("--model", type=Path, required=True, help="folder of the captioner, such as BLIP-2")
    parser.add_argument("--out", type=Path, default=Path("captions.json"), help="(default: %(default)s)")
    parser.add_argument("--batch", type=number(int, 1), default=16,
                        help="images at once (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    caption_folder(args.images, args.model, args.out, args.batch, args.device)


if __name__ == "__main__":
    run(main)
