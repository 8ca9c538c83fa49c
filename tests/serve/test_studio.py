"""A worker of the endpoint, without Ray."""

from dataclasses import replace

import numpy as np

from engine.geometry import Size
from engine.serve.archive import Options
from engine.serve.gallery import RESTORED, Gallery
from engine.serve.studio import Site, Studio
from engine.tiling.canvas import stored_plan
from tests.networks import TINY, random_checkpoint
from tests.serve.conftest import png
from tests.serve.test_archive import picture


def test_what_another_model_began_is_not_shown(tmp_path):
    """A service that is started again with another model begins a picture anew."""
    models = []
    for seed in range(2):
        folder = tmp_path / f"model {seed}"
        folder.mkdir()
        models.append(random_checkpoint(folder, TINY, seed=seed))
    (tmp_path / "p").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    (tmp_path / "p" / "image.png").write_bytes(png(pixels))
    site = Site(tmp_path / "p", replace(picture(), size=Size(40, 48), output=Size(160, 192), options=Options(scale=4)))
    shown = []
    for model in models:
        studio = Studio(model=str(model), threads=1)
        began = studio.begin(site)
        studio.draw(site, tuple(key for key in began.grid.all_keys() if key.level == 0))
        view = Gallery().view(site.folder, RESTORED)
        shown.append(view.read(began.grid.box(next(iter(began.grid.keys(0)))), level=0))
        studio.close()
    assert all(one.final for one in shown)
    assert not np.array_equal(shown[0].pixels, shown[1].pixels)
    (left,) = site.out.glob(f"{RESTORED}.*.inprogress.zarr")
    plan = stored_plan(left)
    assert plan is not None
    assert plan.plan_id == Studio(model=str(models[1]), threads=1)._restorer.plan(site.job, site.request)[0].plan_id
