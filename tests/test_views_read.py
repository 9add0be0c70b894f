"""Reading views: one of each row, all of them, their draws, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from test_views_dump import POLICY_FILE, views  # noqa: F401 (a fixture)

from kd_cache import LogitCache, Policy, UsageError, replay_views
from kd_cache.distill.views import EpochViews
from kd_cache.store.pack import open_pack


@pytest.mark.parametrize("how", [{}, {"preload": False}, {"verify": "lazy", "preload": False}, {"teachers": ["other"]}])
def test_batches_of_views_are_the_packs_rows(views, world, how) -> None:  # noqa: F811
    assert views(3).exit_code == 0
    cache = LogitCache.open(world.cache, **how)
    packs = [open_pack(next((world.cache / "packs").glob(f"{name}-*.h5"))) for name in cache.teachers]
    expected = torch.from_numpy(np.stack([pack.logits.reshape(20, 3, 10) for pack in packs], axis=2))  # [N, V, T, C]
    rows = cache.rows([packs[0].file(row) for row in (4, 0, 19, 4)])
    assert (cache.views, len(cache), cache.num_classes) == (3, 20, 10)
    assert (cache.all_views(rows) == expected[[4, 0, 19, 4]]).all()
    assert (cache.batch(rows) == expected[[4, 0, 19, 4], 0]).all()
    assert (cache.batch(rows, view=2) == expected[[4, 0, 19, 4], 2]).all()
    each = torch.tensor([0, 2, 1, 1])
    for again in (cache, pickle.loads(pickle.dumps(cache))):  # noqa: S301 (our own)
        assert (again.batch(rows, torch.float16, view=each) == expected[[4, 0, 19, 4], each].half()).all()
        assert (again.batch(rows.numpy(), view=each) == expected[[4, 0, 19, 4], each]).all()
    out = torch.empty(4, len(packs), 10)
    assert (cache.batch(rows, out=out, view=each) == expected[[4, 0, 19, 4], each]).all()

    draws = cache.draws(rows, each)
    assert (draws.numpy() == packs[0].draws.reshape(20, 3, -1)[[4, 0, 19, 4], each]).all()
    assert cache.view_policy == Policy.of(POLICY_FILE)
    clean = np.load(world.feature(packs[0].file(4)))[None]
    assert (replay_views(cache.view_policy, clean, draws[:1]) == clean).all()
    replay_views(cache.view_policy, clean, draws[3:])


def test_what_is_refused(views, run, cached) -> None:  # noqa: F811
    cache = LogitCache.open(cached.cache)
    rows = cache.rows(cache.files[:2])
    assert (cache.views, cache.view_policy) == (1, None)
    with pytest.raises(IndexError, match=r"views must lie in \[0, 1\), found 1 to 1"):
        cache.batch(rows, view=1)
    with pytest.raises(UsageError, match="one for each of 2 rows"):
        cache.batch(rows, view=[0, 0, 0])
    for asked in (lambda: cache.draws(rows), lambda: EpochViews(cache, None, 0, 64)):
        with pytest.raises(UsageError, match="has no views"):
            asked()
    policy = ("--views", 2, "--policy", "policy.yaml", "--teacher", "tiny=tiny_teachers:linear", "--only", "tiny")
    assert run("dump", "--target", "b", "--json-path", cached.json_path, *policy).exit_code == 0
    with pytest.raises(UsageError, match=r"did not score the same views .tiny: 2 views, other: no views"):
        LogitCache.open(cached.cache)
    nan = LogitCache.open(cached.cache, ["tiny"], on_miss="nan")
    with pytest.warns(UserWarning, match="served as NaN"):
        found = nan.batch(["nothing.npy", nan.files[0]], view=1)
    assert found.isnan().all(dim=(1, 2)).tolist() == [True, False]
