"""What each synthetic folder adds to a segmenter: the paper's ablation as a table and a picture.

The arms are: real pairs only; with each synthetic folder; with all of them; and the oracle, with fresh true
pairs in the place of synthetic ones: the ceiling of any generator. Every arm is trained with every seed for
equally many steps, so that a gain is not more training.

The name of a run in OUT/runs holds a hash of its settings and data. So a killed comparison goes on, and
several protocols (which pairs the generators saw) share the runs of `real only` and the oracle.

Reads:  what train.py reads.
Writes: out/NAME/compare/{PROTOCOL.md, PROTOCOL.json, PROTOCOL.png, runs/}.
Needs:  train.py, data/pairs.py.

    python bench/compare.py --limit-real 100 --steps 1200 --synth A/masksyn A/imgsyn --protocol a
    python bench/compare.py --limit-real 100 --steps 300 --arms real oracle   # 600, ...: is it saturated?
"""
import hashlib
import json
import sys
from pathlib import Path
from statistics import stdev

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.pairs import (PairFolder, atomic_write, contact_sheet, dataset_name, number,  # noqa: E402
                        read_json, run, write_json, write_picture, write_text)
from train import (SCORE, evaluate_splits, examples, format_score, micro_batch, open_data,  # noqa: E402
                   open_pairs, parse, settings, synthetic_folders, train_segmenter, training_flags)

NAMES = {"masksyn": "MaskSyn", "imgsyn": "ImgSyn"}       # of folders, in the table


def flags():
    parser = training_flags(__doc__.split("\n")[0])
    add = parser.add_argument_group("comparison").add_argument
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="of each arm (0 1 2)")
    add("--arms", nargs="+", default=[], help="of real, MaskSyn, ImgSyn (or a folder's name), both (all) and "
        "oracle; without it all of them")
    add("--oracle", type=Path, help="fresh true pairs; without it those of train/ beyond --limit-real")
    add("--protocol", default="compare", help="name of the table (%(default)s)")
    parser.set_defaults(seed=None)                       # a run's seed is one of --seeds
    return parser


# ---- arms and runs -----------------------------------------------------------------------------------------

def open_arms(args, real):
    """{name: [PairFolder]}: what is trained on beside the real pairs."""
    synth = [open_pairs(folder, args.task, real.classes) for folder in synthetic_folders(args)]
    arms = {"real only": []}
    for pairs in synth:
        name = f"+ {NAMES.get(pairs.folder.name, pairs.folder.name)}"
        if name in arms:
            raise ValueError(f"{pairs.folder}: another folder of --synth has this name. Rename one")
        arms[name] = [pairs]
    if len(synth) > 1:
        arms["+ both" if len(synth) == 2 else "+ all"] = synth
    if args.oracle:
        arms["oracle"] = [open_pairs(args.oracle, args.task, real.classes)]
    elif args.limit_real and len(PairFolder(real.folder)) > args.limit_real:
        arms["oracle"] = [open_pairs(real.folder, args.task, start=args.limit_real)]
    return arms


def choose_arms(arms, names):
    """The arms of these names, in the order of the table; all of them where there are no names."""
    known = {arm.strip("+ ").removesuffix(" only").lower(): arm for arm in arms}
    wanted = [name.lower() for name in names] or list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"{name}: no such arm. There are: {', '.join(known)}. --synth adds folders, "
                             "--oracle or --limit-real the oracle")
    return {arm: arms[arm] for name, arm in known.items() if name in wanted}


def run_arm(args, arm, seed, real, synth, splits):
    """Train and evaluate one arm with one seed, unless that is done -> the folder of its results."""
    cfg = settings(args, real, synth) | {"seed": seed}
    judges = {str(split): pairs.fingerprint() for split, pairs in splits.items()}
    key = hashlib.sha256(json.dumps([cfg, judges], sort_keys=True).encode()).hexdigest()[:10]
    folder = args.out / "runs" / f"{arm.strip('+ ').replace(' ', '_').lower()}_seed{seed}_{key}"
    if (folder / "result.json").exists():
        return folder
    if args.rank == 0:
        print(f"{arm}, seed {seed}: {folder}", flush=True)
    model = train_segmenter(args, cfg, real, synth, folder)
    scores = evaluate_splits(args, model, splits)
    if args.rank == 0:
        rows, captions = examples(model, splits, args.task, args.sides)
        pictures = {f"{row} {caption}": picture for row, pictures in rows.items()
                    for caption, picture in zip(captions, pictures)}
        with atomic_write(folder / "examples.npz") as temporary:
            np.savez_compressed(temporary, **pictures)
        write_json(folder / "result.json", scores)
        (folder / "state.pt").unlink()
    if args.world > 1:
        dist.barrier()
    return folder


# ---- the table ---------------------------------------------------------------------------------------------

def gains(results, arm, split, score):
    """{seed: this arm's score minus that of `real only`}, of the seeds with which both have one."""
    base, own = (scores_by_seed(results, name, split, score) for name in ("real only", arm))
    if arm == "real only":
        return {}
    return {seed: own[seed] - base[seed] for seed in own if None not in (own[seed], base.get(seed))}


def scores_by_seed(results, arm, split, score):
    """{seed: score}, None where there was nothing to measure."""
    return {seed: scores[split][score] for seed, scores in results.get(arm, {}).items()}


def mean(by_seed):
    """The mean of the values of a dict; None where there is none."""
    values = [value for value in by_seed.values() if value is not None]
    return sum(values) / len(values) if values else None


def summarise(results, arm, split, score):
    """An arm on a split, over its seeds. share: its mean gain by the oracle's; None where that has none."""
    values = scores_by_seed(results, arm, split, score)
    gain = gains(results, arm, split, score)
    best = gains(results, "oracle", split, score)
    numbers = [value for value in values.values() if value is not None]
    std = stdev(numbers) if len(numbers) > 1 else 0.0
    share = mean(gain) / mean(best) if gain and best and mean(best) else None
    return dict(mean=mean(values), std=std, values=values, gain=gain, share=share)


def title(args, cfg, score):
    """What a table is of."""
    mix = "synthetic first, then real" if args.pretrain else f"p {args.p_synth}"
    batch = micro_batch(cfg) * args.accumulate * args.world
    seeds = " ".join(map(str, args.seeds))
    return (f"**{args.protocol}**: {args.data}, {cfg['real']['pairs']} pairs, {cfg['steps']} steps of "
            f"{batch}, {mix}, {score}, seeds {seeds}")


def table_row(arm, summaries):
    cells = [arm]
    for one in summaries:
        cells.append(f"{format_score(one['mean'])} ± {one['std']:.1f}")
        cells.append(" ".join(f"{value:+.1f}" for value in one["gain"].values()))
        cells.append("" if one["share"] is None else f"{100 * one['share']:.0f} %")
    return f"| {' | '.join(cells)} |"


def write_table(args, cfg, results, splits):
    """results {arm: {seed: {split: metrics}}} -> OUT/PROTOCOL.md and .json."""
    score = SCORE[args.task]
    arms = {arm: {split: summarise(results, arm, split, score) for split in splits}
            for arm in results if results[arm]}
    columns = [f" {split} | gain by seed | share of oracle's gain |" for split in splits]
    lines = [title(args, cfg, score), "", "| arm |" + "".join(columns)]
    lines.append("|---" * (1 + 3 * len(splits)) + "|")
    lines += [table_row(arm, by_split.values()) for arm, by_split in arms.items()]
    write_text(args.out / f"{args.protocol}.md", "\n".join(lines) + "\n")
    table = dict(protocol=args.protocol, settings=cfg, score=score, arms=arms, runs=results)
    write_json(args.out / f"{args.protocol}.json", table)


def write_examples(args, folders, classes):
    """{arm: folder of a run} -> OUT/PROTOCOL.png: image, truth, and what each arm finds."""
    rows, captions = {"image": [], "truth": []}, []
    for arm, folder in folders.items():
        pictures = np.load(folder / "examples.npz")
        captions = [key.removeprefix("image ") for key in pictures if key.startswith("image ")]
        for row in ("image", "truth"):
            rows[row] = [pictures[f"{row} {caption}"] for caption in captions]
        rows[arm] = [pictures[f"prediction {caption}"] for caption in captions]
    write_picture(args.out / f"{args.protocol}.png", contact_sheet(rows, captions, classes))


def main(argv=None):
    args = parse(flags(), argv)
    if Path(args.protocol).name != args.protocol:
        raise ValueError(f"--protocol {args.protocol}: a name is needed, not a path. The folder is --out")
    args.out = args.out or Path("out") / dataset_name(args.data) / "compare"
    real, splits = open_data(args)
    arms = choose_arms(open_arms(args, real), args.arms)
    for pairs in (real, *splits.values(), *sum(arms.values(), [])):
        pairs.keep()

    cfg, results, folders = settings(args, real, []), {arm: {} for arm in arms}, {}
    for seed in args.seeds:
        for arm, synth in arms.items():
            folder = run_arm(args, arm, seed, real, synth, splits)
            results[arm][seed] = read_json(folder / "result.json")
            folders.setdefault(arm, folder)
            if args.rank == 0:
                write_table(args, cfg, results, list(splits))
    if args.rank == 0:
        write_examples(args, folders, real.classes)
        print((args.out / f"{args.protocol}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
