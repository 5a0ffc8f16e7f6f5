"""transformers' side of ``experiments.decode_speed``, a program of its own: it needs torch and not JAX.

python experiments/decode_rival.py FOLDER ASKED.json ANSWER     writes ANSWER.json (times) and ANSWER.npy (logits)
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

    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        logits = prefill(prompts(1)).logits[:, -1].float().cpu().numpy()
        for batch in asked["batches"]:
            tokens = prompts(batch)
            if batch <= asked["prefill_batch"]:
                found = [seconds(lambda t=tokens: prefill(t)) for _ in range(asked["repeats"] + 2)]
                times[f"prefill/{batch}"] = found[2:]
            found = []
            for _ in range(asked["repeats"] + 1):
                out = prefill(tokens)  # a cache grows: each repeat begins at the same length
                first, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                found.append(seconds(lambda t=first, c=cache: decode(t, c)))
            times[f"decode/{batch}"] = found[1:]
    Path(answer).with_suffix(".json").write_text(
        json.dumps({"times": times, "version": transformers.__version__}), encoding="utf-8"
    )
    np.save(Path(answer).with_suffix(".npy"), logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
