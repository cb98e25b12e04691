"""What a process without lmu_dist gets from exported folders, as JSON. Run by test_transformers_folder in a process of its own.

Packages in HIDDEN are not found here, as if they were not installed. Arguments: the folders; the first one is examined closely.
"""

import json
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path

HIDDEN = {"lmu_dist", "lmu_dist_user_family", "jaxtyping", "ray", "deepspeed", "mlflow", "pydantic", "scipy", "platformdirs"}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


def examine(folder: str, model, tokenizer, torch, auto) -> dict:
    """The behaviour that is the same in all families."""
    texts = ["def f(x):", "class A:\n    pass\n\n\ndef g(xyz): return 2"]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    labels = padded.input_ids  # of the padding too
    with torch.no_grad():
        single = [model(**ids, labels=ids.input_ids) for ids in (tokenizer(t, return_tensors="pt") for t in texts)]
        counts = torch.tensor([logits.logits.shape[1] - 1 for logits in single])
        expected = (torch.stack([output.loss for output in single]) * counts).sum() / counts.sum()
        both = model(**padded, labels=labels).loss
        model.train()
        in_training = model(**padded, labels=labels)
        model.eval()
    errors = []
    for call in (
        lambda: model(labels, attention_mask=padded.attention_mask.flip(1)),
        lambda: model.generate(**padded, max_new_tokens=2),
        lambda: model(labels[0]),
        lambda: model(labels, labels=labels[:, 1:]),
    ):
        try:
            call()
        except ValueError as e:
            errors.append(str(e))
    again = Path(folder).with_name("saved again")
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        restored = auto.from_pretrained(again, trust_remote_code=True)(ids).logits
        half = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)(ids).logits
    beams = [model.generate(ids, num_beams=3, max_new_tokens=4, use_cache=cache).tolist() for cache in (True, False)]
    random = auto.from_config(model.config, trust_remote_code=True)
    return {
        "losses": [float(loss) for loss in (expected, both, in_training.loss)],
        "no logits in training": in_training.logits is None,
        "errors": errors,
        "saved again": torch.equal(restored, logits),
        "bf16": [str(half.dtype), float((half.float() - logits).norm() / logits.norm())],
        "beams": beams[0] == beams[1],
        "new weights": float(random.network.embedding.weight.std() * random.config.hidden_size**0.5),
        "special": tokenizer("a<|endoftext|>b").input_ids,
        "decoded": tokenizer.decode(tokenizer("a , b  .\n").input_ids),
    }


def main(folders: list[str]) -> dict:
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer("def f(x):", return_tensors="pt").input_ids
        tokens = (torch.arange(model.config.max_position_embeddings) * 7919 % model.config.vocab_size)[None]
        with torch.no_grad():
            logits = model(tokens).logits
            half = tokens.shape[1] // 2
            state = model(tokens[:, : half - 2], use_cache=True).text_state
            state = model(tokens[:, half - 2 : half], text_state=state, use_cache=True).text_state
            branches = [model(tokens[:, half:], text_state=state, use_cache=True).logits for _ in range(3)]
        generated = [
            model.generate(ids, max_new_tokens=12, eos_token_id=-1, use_cache=cache).tolist() for cache in (True, False)
        ]
        found[folder] = {
            "logits": logits.tolist(),
            "prompt": ids.tolist(),
            "generated": generated,
            "branches": [float((branch - logits[:, half:]).abs().max()) for branch in branches],
            "parameters": model.num_parameters(),
            "end": model.generation_config.eos_token_id,
        }
        # All in folders of one name: transformers must not take the code of the one before.
        other = Path(folder).parent / "copies" / Path(folder).name / "model"
        shutil.copytree(folder, other)
        again = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
        with torch.no_grad():
            found[folder]["copied"] = torch.equal(again(tokens).logits, logits)
        if folder == folders[0]:
            found[folder] |= examine(folder, model, tokenizer, torch, AutoModelForCausalLM)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
