"""The example for video autoencoders: parts of a video give the z of the whole, and torch.randn leaves seams."""

import pytest
import torch

from examples import video_tiles as video


@pytest.fixture(scope="module")
def model():
    return video.train(steps=1, quiet=True)


@pytest.fixture(scope="module")
def clip():
    return video.moving_discs(8, 4, 64, seed=5)


@torch.no_grad()
@pytest.mark.parametrize(("parts", "overlap"), [(video.rows(16, 16, 3), 0), (video.tiles(16, 16, 8, 3), 3)])
def test_parts_give_the_z_of_the_whole(model, clip, parts, overlap):
    whole = model.posterior(clip).rsample(seed=7)
    z = video.encode(model, clip, parts, video.noise_of_the_whole(7), overlap)
    torch.testing.assert_close(z, whole, rtol=0, atol=2e-5)


def test_noise_of_its_own_spreads_less_where_tiles_overlap(model, clip):
    torch.manual_seed(0)
    tiles = video.tiles(16, 16, 8, 4)
    own, shared = (
        video.spread(model, clip, video.encode(model, clip, tiles, draw, 4))
        for draw in (video.noise_of_its_own, video.noise_of_the_whole(7))
    )
    assert own.min() < 0.65 < 0.8 < shared.min()


def test_the_picture_is_drawn(model, clip, tmp_path):
    ways = dict.fromkeys(("whole", "tiles"), torch.zeros(8, 4, 4, 16, 16))
    path = video.picture(model, clip, ways, tmp_path / "v.png")
    assert path.read_bytes().startswith(b"\x89PNG")
