"""Tokens per second of other programs on given prompts; `launch.bench.decode --peers` calls it.

    .venv/parity/bin/python launch/bench/peers.py JOB.json

Imports nothing of this project: it runs in the environment of launch/bench/peers.sh. JOB names a
GGUF file, prompts as token ids, the number of tokens and of repeats, threads, and the type of the
weights. One line of JSON for each program: decoding alone, the prefill subtracted (the time of a
run of N tokens less that of a run of one). What cannot run here is said on stderr.
"""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def speed(job: dict[str, Any], run: Callable[[int], int]) -> float:
    """Tokens per second after the first token; `run(n)` generates n per row, returns how many."""
    run(1)
    rates = []
    for _ in range(job["repeats"]):
        begin = time.perf_counter()
        first = run(1)
        between = time.perf_counter()
        all_of_them = run(job["tokens"])
        end = time.perf_counter()
        rates.append((all_of_them - first) / ((end - between) - (between - begin)))
    return statistics.median(rates)


def transformers_peers(job: dict[str, Any]):
    """Greedy generate, and assisted generation by prompt look-up (it has no smaller model)."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    path = pathlib.Path(job["gguf"])
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype
    ).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(job["prompts"])

    def run(n: int, **options: Any) -> int:
        with torch.inference_mode():
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n,
                min_new_tokens=n, do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
        return int(out.shape[0] * (out.shape[1] - prompts.shape[1]))

    yield "transformers", lambda: speed(job, run)
    if len(job["prompts"]) == 1:  # assisted generation takes one row

        def assisted(n: int) -> int:
            return run(n, prompt_lookup_num_tokens=job["k"])

        yield "transformers, prompt look-up", lambda: speed(job, assisted)


def llama_cpp_peers(job: dict[str, Any]):
    """llama.cpp with weights of the same width, written from the GGUF once."""
    import llama_cpp

    path = _widened(pathlib.Path(job["gguf"]), job["dtype"])
    context = len(job["prompts"][0]) + job["tokens"] + 8
    model = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=512, n_threads=job["threads"],
        n_threads_batch=job["threads"], verbose=False,
    )  # fmt: skip

    def run(n: int) -> int:
        model.reset()
        model.eval(job["prompts"][0])
        for done in range(n):
            token = model.sample(temp=0.0)
            if done < n - 1:
                model.eval([token])
        return n

    if len(job["prompts"]) == 1:
        yield "llama.cpp", lambda: speed(job, run)


def _widened(path: pathlib.Path, dtype: str) -> pathlib.Path:
    """The same model with its matrices in float32 or bfloat16, beside the file."""
    import gguf
    import numpy as np

    out = path.with_name(f"{path.stem}-{dtype}.gguf")
    if out.exists():
        return out
    reader = gguf.GGUFReader(path)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if dtype == "bfloat16" and values.ndim > 1:
            narrow = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, narrow, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)
    return out


def main() -> None:
    job = json.loads(pathlib.Path(sys.argv[1]).read_text())
    for peers in (transformers_peers, llama_cpp_peers):
        try:
            for name, measured in peers(job):
                print(json.dumps({"method": name, "tokens_per_s": measured()}), flush=True)
        except Exception as error:  # of any kind: not installed, out of memory, unsupported
            print(f"{peers.__name__}: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
