"""Ours beside theirs: what bench/vs_diffusers.py and bench/vs_transformers.py share.

Times are taken in turns within one process, so that other load of the machine falls on both sides. Memory is
measured in a process for each side, because memory that a side has freed would hide what the other one needs.

Needs:  data/pairs.py, with the project on sys.path.

A call is a function of no arguments that does what is measured once and returns its output.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.pairs import FlagParser, write_json

SIDES = "ours", "theirs"


def clock(device):
    """Seconds of a clock, read when the device has done all its work."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(calls, rounds, device):
    """{name: call} -> {name: median seconds}, {name: output of the first round}.

    The first round warms up and is not timed. Every second round goes the other way round.
    """
    seconds = {name: [] for name in calls}
    outputs = {}
    for turn in range(rounds + 1):
        for name in sorted(calls, reverse=turn % 2 == 1):
            start = clock(device)
            output = calls[name]()
            if turn:
                seconds[name].append(clock(device) - start)
            else:
                outputs[name] = output
    return {name: statistics.median(times) for name, times in seconds.items()}, outputs


def resident_memory(key):
    """A number of /proc/self/status in MB: VmRSS, what this process holds now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(key + ":")[1].split()[0]) / 1024


def peak_memory(build, device, repeat=1):
    """MB at the peak of the call that build() returns, weights included.

    On the CPU the highest resident size above that before build(), on CUDA the allocator's peak. A training
    step needs repeat=2: from the second on, the optimiser has its state.
    """
    cuda = str(device).startswith("cuda")
    before = resident_memory("VmRSS")
    call = build()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")        # forget the peak of reading the weights
    for _ in range(repeat):
        call()
    return torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else resident_memory("VmHWM") - before


def number_of_child(*arguments):
    """Run this script again in a process of its own -> the number that it prints last."""
    command = [sys.executable, sys.argv[0], *map(str, arguments)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(child.stdout.split()[-1])


def parser_of(description):
    """A parser with the flags of both scripts."""
    parser = FlagParser(description=description)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="turns of each side, 0: memory only")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks of memory")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ...")
    add("--json", type=Path, metavar="FILE", help="also write the rows here")
    add("--peak", nargs="+", help=argparse.SUPPRESS)         # for the processes that measure memory
    return parser


def report(rows, args):
    """Print rows {"what", "ours", "theirs", ...} as they come; --json: then write them and the flags."""
    finished = []
    for row in rows:
        finished.append(row)
        ratio = row["theirs"] / row["ours"]
        line = f"{row['what']:20} ours {row['ours']:9.3f}  theirs {row['theirs']:9.3f}  ratio {ratio:.2f}"
        for key in list(row)[3:]:
            line += f"  {key} {row[key]:.3g}"
        print(line, flush=True)
    if args.json:
        flags = {key: value for key, value in vars(args).items() if key not in ("json", "peak")}
        write_json(args.json, dict(threads=torch.get_num_threads(), **flags, rows=finished))
