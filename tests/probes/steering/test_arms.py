import torch

from probes.steering import make_arms


def test_every_direction_has_length_one_and_controls_know_nothing_of_the_probe() -> None:
    direction = 5 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    arms = make_arms(direction, [-1, 2], controls=3)
    assert [(arm.along, arm.number, arm.scale) for arm in arms[:4]] == [
        ("nothing", 0, 0), ("probe", 0, -1), ("probe", 0, 2), ("random", 0, -1)
    ]  # fmt: skip
    assert len(arms) == 1 + 2 * 7
    probe = arms[1].direction
    assert probe is not None
    torch.testing.assert_close(probe, (direction / direction.norm()).double())
    orthogonal = torch.stack([a.direction for a in arms if a.along == "orthogonal" and a.scale == 2])  # type: ignore[misc]
    random = torch.stack([a.direction for a in arms if a.along == "random" and a.scale == 2])  # type: ignore[misc]
    for rows in (orthogonal, random):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (orthogonal @ probe).abs().max() < 1e-9
    assert (random @ probe).abs().max() > 1e-3


def test_a_seed_gives_the_same_controls_and_another_gives_others() -> None:
    first, again, other = (make_arms(torch.ones(8), [1], 1, seed) for seed in (1, 1, 2))
    for place in (2, 3):
        assert torch.equal(first[place].direction, again[place].direction)
        assert not torch.allclose(first[place].direction, other[place].direction)


def test_without_controls_there_is_the_probe_alone() -> None:
    assert [arm.along for arm in make_arms(torch.ones(8), [1], 0)] == ["nothing", "probe"]
