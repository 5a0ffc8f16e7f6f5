"""transformers' side of ``experiments.decode_speed``, a program of its own: it needs torch and not JAX.

python experiments/decode_rival.py FOLDER ASKED.json ANSWER     writes ANSWER.json (times) and ANSWER.npz (logits)
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: str, asked_file: str, answer: str) -> None:
    import numpy as np
    import torch
    import transformers

    asked = json.loads(Path(asked_file).read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"dtype": getattr(torch, asked["dtype"]), "attn_implementation": "sdpa"}
    if device == "cuda":
        settings["experts_implementation"] = "grouped_mm"  # the fastest that it has (5.x)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).to(device).eval()

    def prompts(batch: int) -> Any:
        """Those of ``experiments.decode_speed.prompts``."""
        tokens = np.random.default_rng(batch).integers(0, asked["vocab_size"], (batch, asked["context"]), np.int32)
        return torch.from_numpy(tokens.astype(np.int64)).to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def prefill(tokens: Any) -> Any:
        return model(tokens, use_cache=True, logits_to_keep=1)

    def filled(tokens: Any) -> tuple[Any, Any]:
        """The first new token of each row and the cache, made for as many rows at a time as prefill is timed with."""
        parts = [prefill(rows) for rows in tokens.split(asked["prefill_batch"])]
        first = torch.cat([part.logits[:, -1:].argmax(-1) for part in parts])
        if len(parts) == 1:
            return first, parts[0].past_key_values
        caches, whole = [part.past_key_values for part in parts], transformers.DynamicCache(config=model.config)
        del parts
        for i in range(len(caches[0].layers)):
            layers = [cache.layers[i] for cache in caches]
            whole.update(torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]), i)
            for layer in layers:
                layer.keys = layer.values = None
        return first, whole

    def decode(tokens: Any, cache: Any) -> Any:
        for _ in range(asked["new_tokens"]):
            out = model(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        return tokens

    def seconds(call: Any) -> float:
        wait()
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin

    def measure(what: str, call: Any, skip: int) -> None:
        """Seconds of each repeat after the first ``skip``, or why there are none."""
        try:
            times[what] = [call() for _ in range(asked["repeats"] + skip)][skip:]
        except torch.OutOfMemoryError as error:
            failed[what] = str(error)[:300]
            torch.cuda.empty_cache()

    def decoding(tokens: Any) -> float:
        first, cache = filled(tokens)  # a cache grows: each repeat begins at the same length
        return seconds(lambda: decode(first, cache))

    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    with torch.inference_mode():
        logits = {"asked": prefill(prompts(1)).logits[:, -1].float().cpu().numpy()}
        for batch in asked["batches"]:
            tokens = prompts(batch)
            if batch <= asked["prefill_batch"]:
                measure(f"prefill/{batch}", lambda t=tokens: seconds(lambda: prefill(t)), 2)
            measure(f"decode/{batch}", lambda t=tokens: decoding(t), 1)
        if device == "cuda":
            model.set_experts_implementation("eager")  # any type
        model = model.float()
        logits["exact"] = prefill(prompts(1)).logits[:, -1].cpu().numpy()
    Path(answer).with_suffix(".json").write_text(
        json.dumps({"times": times, "failed": failed, "version": transformers.__version__}), encoding="utf-8"
    )
    np.savez(Path(answer).with_suffix(".npz"), **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
