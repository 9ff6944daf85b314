"""What a training refuses: one line, before the first step and before the run's folder is made."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import phi3v
from phi3v.errors import CheckpointError, ConfigError, DataError, DeviceError, MissingPackageError, TrainingError
from phi3v.recipe import RUN_FILES
from phi3v.training import train as training
from phi3v.training.arguments import SHARDED_OPTIMISERS, check_options
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.doctor import examine
from phi3v.training.memory_plan import plan_recipe
from phi3v.training.optimiser_checks import check_optimiser
from phi3v.tuning import PartCount, TrainableReport

MakeRecipe = Callable[..., phi3v.Recipe]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lerning_rate": 1e-3}, "training.lerning_rate is no option: did you mean learning_rate"),
        ({"device": "cuda"}, "training.device is no option: did you mean model.device[?]"),
        *(
            ({slip: 1}, f"^training.{slip} is no option: did you mean {meant}[?]$")
            for slip, meant in {
                "samples_per_steps": "samples_per_step",
                "num_epochs": "epochs",
                "microbatch_size": "micro_batch_size",
                "early_stop": "early_stopping",
                "fast_loras": "fast_lora",
                "weight_decy": "weight_decay",
            }.items()
        ),
        ({"fp16": True}, "training.fp16 is decided by model.dtype"),
        ({"max_seq_length": 512}, "training.max_seq_length is decided by data.max_length"),
        ({"optim": "adamw_foo"}, "^training.optim is 'adamw_foo', which is no choice: did you mean adamw_torch[?]$"),
        ({"lr_scheduler_type": "cosin"}, "training.lr_scheduler_type is 'cosin', .*: did you mean cosine?"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 1}}, "^training.lr_scheduler_ty.*cycles"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "^training.lr_scheduler_type=warmup_stable_decay with lr_scheduler_kwargs={}: .*'num_decay_steps'$",
        ),
        (
            {"load_best_model_at_end": True, "save_steps": 3, "eval_steps": 2},
            "^training.load_best_model_at_end requires the saving steps to be .*, which is not a round multiple of 2",
        ),
        ({"optim": "adamw_torch_npu_fused"}, "^training.optim=adamw_torch_npu_fused: .*torch_npu"),
        ({"hub_token": "hf_x"}, "training.hub_token is decided by HF_TOKEN .*a recipe lies in the run's folder"),
        ({"device_map": "auto"}, "training.device_map is decided by torchrun, a process for each GPU"),
        ({"fsdp_config": {"version": 1}}, "training.fsdp_config.version is 1: ranks share a model by FSDP2"),
        ({"fsdp": True}, "training.fsdp shares a model among several processes"),
        *(
            ({name: value}, f"^training.{name} is {value}, allowed is a finite number, ")
            for name, value in [
                ("adam_epsilon", 0.0),
                ("adam_beta1", 1.0),
                ("weight_decay", math.nan),
                ("max_grad_norm", math.nan),
                ("save_steps", 0),
                ("logging_steps", 0),
                ("save_total_limit", 0),
                ("neftune_noise_alpha", math.inf),
            ]
        ),
        *(
            ({name: value}, f"^training.{name} is {value}, allowed is a whole number{words}")
            for name, value, words in [
                ("save_total_limit", 1.5, ", 1 or more .null keeps all"),
                ("ddp_timeout", 2.5, "$"),
                ("dataloader_num_workers", True, ", 0 or more$"),
            ]
        ),
        ({"weight_decay": "much"}, "training.weight_decay is 'much', allowed is a number"),
        (
            {"dataloader_num_workers": -1},
            "^training.dataloader_num_workers is -1, allowed is a whole number, 0 or more$",
        ),
        ({"logging_first_step": "no"}, "training.logging_first_step is 'no', allowed are true and false"),
        ({"gradient_checkpointing_kwargs": 1}, "training.gradient_checkpointing_kwargs is 1, allowed is a mapping"),
        *(
            (
                {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs},
                f"^training.activation_checkpointing_kwargs.{expected}$",
            )
            for kwargs, expected in [
                ({"every_n_layers": 0}, "every_n_layers is 0, allowed is a whole number, 1 or more"),
                ({"every_n_layers": "two"}, "every_n_layers is 'two', allowed is a whole number, 1 or more"),
                ({"every_n_layer": 2}, "every_n_layer is no option: did you mean every_n_layers[?]"),
                ({"offload": "no"}, "offload is 'no', allowed are true and false"),
            ]
        ),
        (
            {"activation_checkpointing_kwargs": {"every_n_layers": 2}},
            "^training.activation_checkpointing_kwargs says how .* set training.activation_checkpointing=true, or take",
        ),
        ({"label_names": ["labels"]}, "training.label_names cannot be chosen"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "exact_match"},
            "^training.metric_for_best_model is 'exact_match', .* evaluation.during_training is 0: set",
        ),
        (
            {"early_stopping": 2, "metric_for_best_model": "eval_f1"},
            "^training.metric_for_best_model is 'eval_f1', allowed are eval_loss and, .* exact_match and similarity$",
        ),
        *(
            (
                {name: value, **options},
                f"^training.{name} needs a checkpoint at each validation, and eval_strategy is {found}: set both to "
                "epoch, or both to steps and save_steps to a multiple of eval_steps$",
            )
            for name, value, options, found in [
                ("early_stopping", 2, {"eval_strategy": "steps", "eval_steps": 5}, "steps, save_strategy epoch"),
                ("early_stopping", 2, {"save_steps": 5}, "epoch, save_strategy steps"),
                ("load_best_model_at_end", True, {"save_strategy": "no"}, "epoch, save_strategy no"),
            ]
        ),
        ({"dataloader_persistent_workers": True}, "^training.dataloader_persistent_workers is decided by the run"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "^training.train_sampling_strategy is decided by training.seed",
        ),
    ],
)
def test_options_of_training_are_checked(make: MakeRecipe, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        phi3v.train(make(training=options))
    assert "\n" not in str(error.value) and len(str(error.value)) < 220
    assert not Path(make().output).exists()


def test_what_says_how_to_checkpoint_may_stay_where_checkpointing_is_switched_off() -> None:
    """`phi3v plan` advises false, and a sweep tries both; FSDP2's own switch is one too."""
    how = {"activation_checkpointing_kwargs": {"every_n_layers": 2, "use_reentrant": False}}
    for switch in ({"activation_checkpointing": False}, {"gradient_checkpointing": "auto"}):
        check_options({**how, **switch})
    check_options({**how, "fsdp": True, "fsdp_config": {"activation_checkpointing": True}})


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "adafactor", "rmsprop_bnb"])
def test_optimisers_that_cannot_step_a_sharded_model_are_refused_with_those_that_can(name: str) -> None:
    check_options({"optim": name})
    with pytest.raises(ConfigError, match=f"^training.optim is '{name}', .* sharded: .* set one of adamw_torch, ada.*"):
        check_options({"optim": name, "fsdp": True})
    for able in (*SHARDED_OPTIMISERS, None):
        check_options({"fsdp": True, **({"optim": able} if able else {})})


def refusals(world: Path) -> list[tuple[dict[str, Any], type[Exception], str]]:
    """Sections of recipes that are refused when options, rows or weights are looked at, and why."""
    (world / "empty.jsonl").write_text("")
    done, base = world / "done", str(world / "model")
    (done / "adapter").mkdir(parents=True, exist_ok=True)
    for name in (*RUN_FILES, "adapter/adapter_config.json"):
        (done / name).write_text(json.dumps({"base_model_name_or_path": base}))
    return [
        (
            {"model": {"name": str(done)}},
            ConfigError,
            f"is a run under LoRA .* go on from it set model.name={base} model.adapter={done}$",
        ),
        (
            {"model": {"name": str(done / "adapter")}},
            ConfigError,
            f"is an adapter and .* model.adapter={done}/adapter$",
        ),
        *(
            ({"training": options}, ConfigError, words)
            for options, words in [
                (
                    {"adam_epsilon": 1e-60},
                    "^training.learning_rate 0.0002 with .*adamw_torch_fused makes .* no numbers",
                ),
                ({"optim": "sgd", "learning_rate": 1e39}, r"^training.learning_rate 1e\+39 with training.optim=sgd: "),
                ({"optim_args": "a=b"}, "^training.optim_args names 'a', which adamw_torch_fused does not read"),
                ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "^training.optim_args names weight_decay, which"),
                ({"max_steps": 1, "warmup_steps": 100}, "^the learning rate is 0 in each of the 1 steps .*warmup_st"),
                (
                    {"samples_per_step": 10, "epochs": 1, "warmup_steps": 0.1},
                    "^the learning rate is 0 in each of the 1",
                ),
            ]
        ),
        ({"lora": {"r": 0}}, ConfigError, "^lora.r is 0, allowed is a whole number, 1 or more"),
        ({"lora": {"lora_dropout": 7.0}}, ConfigError, "^lora: .*between 0 and 1"),
        ({"lora": {"lora_dropout": 1.0}}, ConfigError, "^lora.lora_dropout is 1, which drops all"),
        ({"lora": {"lora_alpha": 0}}, ConfigError, "^lora.lora_alpha is 0, allowed is a number above 0"),
        ({"lora": {"alpha_pattern": {"o_proj": -1}}}, ConfigError, "^lora.alpha_pattern: that of 'o_proj' is -1, allo"),
        ({"lora": {"target_modules": ["query"]}}, ConfigError, "hits no module"),
        ({"lora": {"exclude_modules": ["down_proj"]}}, ConfigError, "that lora.exclude_modules leaves: take it out of"),
        (
            {"lora": {"modules_to_save": ["lm_head", "bogus"]}},
            ConfigError,
            "^lora.modules_to_save: 'bogus' hits no mod",
        ),
        (
            {"lora": {"modules_to_save": "lm_head"}},
            ConfigError,
            "^lora.modules_to_save is 'lm_head', allowed is a list",
        ),
        ({"lora": {"init_lora_weights": "pissa_niter_4"}}, ConfigError, "^lora.init_lora_weights .* use pissa, which"),
        ({"lora": {"layers_to_transform": [1, 7]}}, ConfigError, "^lora.layers_to_transform: 7 is no .* from 0 to 1$"),
        ({"data": {"train": str(world / "nothing.csv")}}, DataError, "nothing.csv"),
        ({"data": {"answer": "{shade}"}}, DataError, "column 'shade'"),
        ({"data": {"max_length": 5}}, DataError, "too_long|longest|tokens"),
        (
            {"training": {"load_best_model_at_end": True}},
            ConfigError,
            "^training.load_best_model_at_end needs held-out rows: set data.split or data.validation$",
        ),
        ({"evaluation": {"numeric_fields": ["foo"]}}, ConfigError, "evaluation.numeric_fields names 'foo'"),
        ({"model": {"name": str(world / "nowhere")}}, CheckpointError, "nowhere"),
        ({"model": {"name": str(world / "model"), "device": "gpu"}}, ConfigError, "model.device 'gpu'"),
    ]


@pytest.mark.parametrize("number", range(23))
def test_what_is_refused_leaves_no_folder(make: MakeRecipe, world: Path, number: int) -> None:
    sections, error, words = refusals(world)[number]
    recipe = make(**sections)
    told: list[TrainingEvent] = []
    with pytest.raises(error, match=words) as caught:
        phi3v.train(recipe, on_event=told.append)
    assert "\n" not in str(caught.value) and "step" not in {event.kind for event in told}
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize("command", [phi3v.train, examine, plan_recipe])
def test_lora_that_misses_the_model_is_told_before_rows_are_read(
    make: MakeRecipe, world: Path, command: Callable[..., Any]
) -> None:
    """Reading them is what takes long: here there are none, which would be told next."""
    recipe = make(lora={"target_modules": ["q_proj", "v_proj"]}, data={"train": str(world / "nothing.csv")})
    with pytest.raises(ConfigError, match="^lora.target_modules: 'q_proj' and 'v_proj' hit only the vision part"):
        command(recipe)


def test_processes_that_do_not_know_of_each_other_are_refused(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE is 2: .* start them with torchrun") as caught:
        phi3v.train(make())
    assert "\n" not in str(caught.value) and not Path(make().output).exists()


@pytest.mark.parametrize(("warmup", "warned"), [(100, True), (10, False), (0.5, False)])
def test_a_warm_up_longer_than_the_run_is_warned_of(
    make: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, warmup: float, warned: bool
) -> None:
    """Of 4 steps the last has 3 of 100 parts of the learning rate, or 3 of 10."""
    arguments = TrainingArguments(str(tmp_path), warmup_steps=warmup, learning_rate=1e-3, use_cpu=True)
    check_optimiser(arguments, torch.nn.Linear(1, 1), make(training={"max_steps": 4}), [])
    lines = [one.getMessage() for one in caplog.records if one.name == "phi3v.training.optimiser_checks"]
    assert len(lines) == warned
    if warned:
        assert (
            lines[0].startswith("the learning rate is at most 3e-05 in the 4 steps") and "warmup_steps=100" in lines[0]
        )


def test_nothing_to_train_is_one_line(make: MakeRecipe) -> None:
    idle = TrainableReport({"language model": PartCount(0, 10)})
    with pytest.raises(TrainingError, match="nothing trains"):
        training._refuse_idle_training(idle)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_line(make: MakeRecipe) -> None:
    recipe = make().with_overrides(["model.device=cuda"])
    with pytest.raises(DeviceError, match="sees no GPU"):
        phi3v.train(recipe)


def test_a_missing_tracker_names_its_command(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v.training import trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "phi3v\[tracking\]"'):
        phi3v.train(make(report={"to": "wandb"}))


def test_a_tracker_without_an_account_is_one_line(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="run `wandb login`, or set WANDB_MODE=offline") as caught:
        phi3v.train(make(report={"to": "wandb"}))
    assert "\n" not in str(caught.value) and not Path(make().output).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_is_not_here_is_found_before_anything_is_loaded(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "load_processor", lambda *args, **options: pytest.fail("loaded"))
    for sections, error, words in (
        ({"training": {"use_liger_kernel": True}}, DeviceError, "training.use_liger_kernel needs a GPU"),
        ({"model": {"attn_implementation": "flex_attention"}}, DeviceError, "flex_attention cannot train on a CPU"),
        (
            {"training": {"push_to_hub": True}},
            ConfigError,
            "^training.push_to_hub is true and the hub knows no account here [(].*take",
        ),
    ):
        with pytest.raises(error, match=words) as caught:
            phi3v.train(make(**sections))
        assert "\n" not in str(caught.value) and not Path(make().output).exists()
