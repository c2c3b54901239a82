"""Which adapters the zoo has, and how they differ."""

from dataclasses import dataclass, field

from peft import LoraConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIRST_LAYER, LAYER_COUNT = 26, 30


@dataclass(frozen=True)
class Recipe:
    name: str
    domain: str
    data_seed: int
    init_seed: int
    rank: int = 8
    alpha: int = 16
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            target_modules=list(PROJECTIONS),
            layers_to_transform=list(range(FIRST_LAYER, LAYER_COUNT)),
        )


RECIPES = (
    Recipe("math-a", "math", data_seed=0, init_seed=0),
    Recipe("math-b", "math", data_seed=1, init_seed=0),
    Recipe("code", "code", data_seed=0, init_seed=0),
    Recipe("science", "science", data_seed=0, init_seed=0),
    Recipe("safety", "safety", data_seed=0, init_seed=0),
    # A pattern shifts PEFT's stream of random numbers: the same seed would not give the same A.
    Recipe(
        "instruct",
        "instruct",
        data_seed=0,
        init_seed=1,
        rank_pattern={"down_proj": 4},
        alpha_pattern={"down_proj": 4},
    ),
    Recipe("code-r4", "code", data_seed=1, init_seed=2, rank=4, alpha=8),
    # alpha / sqrt(8) = 2.1, close to the 2 of the others.
    Recipe("science-rslora", "science", data_seed=1, init_seed=3, alpha=6, use_rslora=True),
)
