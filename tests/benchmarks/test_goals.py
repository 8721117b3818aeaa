from benchmarks.goals import goal_table


def document(gpu="NVIDIA H200, 143771 MiB, 580.1", model="qwen2.5-7b"):
    records = [
        {"workload": name, "engine": "trunkline", "median": median}
        for name, median in {
            "1x128-256": {"output_tok_s": 260.0, "prefill_tok_s": None},
            "128x1024-1": {"output_tok_s": 50.0, "prefill_tok_s": 56040.0},
            "no-such-workload": {"output_tok_s": 1.0, "prefill_tok_s": None},
        }.items()
    ]
    return {
        "machine": {"gpus": [gpu] if gpu else []},
        "model": model,
        "engines": {"trunkline": {"first_token_seconds": 12.04}},
        "records": records,
    }


def test_results_stand_beside_the_goals_of_their_model_and_gpu():
    rows = goal_table(document(), "trunkline").splitlines()[2:]
    assert rows == [
        "| 1x128-256 | 260.0 | 208 | 240 | 1.25 | 1.08 | 283 |",
        "| 128x1024-1 (input tok/s) | 56,040.0 | 46,700 | 50,000 | 1.20 | 1.12 | 59,000 |",
        "| start to first token (s) | 12.0 | 70 | 15 | 0.17 | 0.80 | - |",
    ]


def test_other_machines_and_models_have_no_goals():
    assert goal_table(document(gpu="NVIDIA A100-SXM4-80GB"), "trunkline") == ""
    assert goal_table(document(gpu=None), "trunkline") == ""
    assert goal_table(document(model="other"), "trunkline") == ""
    assert "260.0" in goal_table(document(model="/somewhere/qwen2.5-7b"), "trunkline")
