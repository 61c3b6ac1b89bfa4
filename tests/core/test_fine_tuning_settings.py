"""Settings of fine-tuning are refused by the name of the flag, before anything runs."""

import pytest

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.fine_tuning_settings import FineTuningSettings, fine_tuning_settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 0}, "epochs: .*, got 0"),
        ({"patience": 0}, "patience: .*, got 0"),
        ({"schedule": "slow"}, "schedule: .*, got 'slow'"),
        ({"method": "magic"}, "method: .*no method 'magic'"),
        ({"layers": "decoder", "method": "norm"}, "layers: .*only method 'lora'"),
        ({"rank": 0}, "rank: .*, got 0"),
        ({"learning_rate": float("nan")}, "learning-rate: .*finite"),
        ({"batch_size": 0}, "batch-size: .*, got 0"),
        ({"gate": "open"}, "gate: .*, got 'open'"),
        ({"device": "abacus"}, "device: .*, got 'abacus'"),
        ({"rounds": 3}, "rounds: .*, got 3"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        fine_tuning_settings(**given)


def test_what_was_not_given_is_the_default() -> None:
    assert fine_tuning_settings(rank=None, epochs=3) == FineTuningSettings(epochs=3)


def test_ranks_above_those_of_a_federation_are_allowed() -> None:
    settings = fine_tuning_settings(rank=32)
    assert settings.run_settings().rank == settings.run_settings().max_rank == 32


def test_the_learning_rate_falls_to_a_tenth() -> None:
    settings = FineTuningSettings(learning_rate=0.02)
    rates = [settings.learning_rate_in(epoch, 5) for epoch in range(1, 6)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[2] == pytest.approx(0.011)  # half way: the mean of both ends
    assert rates[-1] == pytest.approx(0.002)
    assert rates == sorted(rates, reverse=True)
    assert settings.learning_rate_in(1, 1) == 0.02
