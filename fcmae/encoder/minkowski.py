"""The MinkowskiEngine layout: true sparse convolution over its coordinate maps; only this module names the engine.

The engine keeps coordinates, finds neighbours (its kernel maps) and computes the strided convolutions. The
depthwise convolution is ours, over its kernel maps: the release has a Python loop of scatters only. The stem is a
matrix product of visible windows, which do not overlap.

What the engine asks for, handled here:

- It has float32 and float64 only: under autocast its convolutions run in float32.
- With several threads its kernel maps come in an order that varies from run to run, so that a resumed run would
  differ in the last digit: it gets one, which is no slower. It sets that number for all of OpenMP, torch included,
  so torch's is given back.
- An empty tensor ends the process: there is always an image and a visible patch.
- On CUDA its copying convolution has failed on Hopper (direct mode is taken), and its kernels ignore the current
  stream (it runs on the default one, with waits on either side).
- Rows of strided maps lie in hash order: ours are sorted by position, and permuted where they meet the engine's.
"""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fcmae.encoder.layouts import SITES_PER_PATCH, Sites
from fcmae.ops.gather_depthwise import gather_depthwise

KERNEL_SIZE = 7
"""Of the depthwise convolutions, whose kernel map the blocks of a stage share."""


def import_engine() -> Any:
    """Import MinkowskiEngine, which is optional.

    Raises:
        ValueError: if it is missing or broken, saying how to install it.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it was built for the CPU
            return importlib.import_module("MinkowskiEngine")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "MinkowskiEngine"
        raise ValueError(
            f"layout 'minkowski' needs MinkowskiEngine, which {'is not installed' if missing else 'does not load'}"
            f"{'' if missing else f' with torch {torch.__version__} ({error})'}: run make minkowski "
            "(python -m fcmae.encoder.install_minkowski), or take layout 'packed', which gives the same numbers"
        ) from error
    finally:
        if threads is None:  # it sets 16 on larger machines, also for every process started from here
            os.environ.pop("OMP_NUM_THREADS", None)


@contextmanager
def _calling(device: torch.device) -> Iterator[None]:
    """Inside, OpenMP has one thread and CUDA its default stream, which comes after all asked of the current one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if device.type == "cuda":
            current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
            default.wait_stream(current)
            with torch.cuda.stream(default):
                yield
            current.wait_stream(default)
        else:
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class MinkowskiSites(Sites):
    """Active sites as (b, m, c): the m rows of each image sorted by position, images after each other."""

    grid: tuple[int, int]
    """Sites (h, w), hidden ones included."""
    num_images: int
    manager: Any
    """The engine's coordinate manager."""
    key: Any
    """Names the coordinate map of this layout in the manager."""
    stride: int = 1
    """Between neighbouring sites, in the coordinates of the first stage."""

    @classmethod
    def of_patches(cls, grid: tuple[int, int], visible_ids: Tensor, sites_per_patch: int = SITES_PER_PATCH) -> Self:
        """Return the layout of the visible patches (b, p) of a patch grid, from their ids alone.

        Raises:
            ValueError: if the engine is missing, was built without the CUDA that is asked of it, or b or p is 0.
        """
        engine = import_engine()
        if visible_ids.numel() == 0:
            raise ValueError(
                f"layout 'minkowski' needs an image and a visible patch, got {tuple(visible_ids.shape)}"
            )
        device = visible_ids.device
        if device.type == "cuda" and not engine.is_cuda_available():
            raise ValueError(
                "this MinkowskiEngine was built for the CPU only: run make minkowski "
                "(python -m fcmae.encoder.install_minkowski) on this machine"
            )
        k = sites_per_patch
        image, patch, row, col = torch.meshgrid(
            *(torch.arange(n, device=device) for n in (*visible_ids.shape, k, k)), indexing="ij"
        )
        ids = visible_ids[image, patch]
        coordinates = torch.stack([image, ids // grid[1] * k + row, ids % grid[1] * k + col], -1)
        map_type = engine.CoordinateMapType.CUDA if device.type == "cuda" else engine.CoordinateMapType.CPU
        with _calling(device):
            manager = engine.CoordinateManager(D=2, num_threads=1, coordinate_map_type=map_type)
            key, _ = manager.insert_and_map(coordinates.view(-1, 3).int(), 1)
        return cls((grid[0] * k, grid[1] * k), len(visible_ids), manager, key)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        image, row, col = self.manager.get_coordinates(self.key).long().unbind(1)
        positions = (image * self.grid[0] + row // self.stride) * self.grid[1] + col // self.stride
        return positions.sort()

    @property
    def _positions(self) -> Tensor:
        """Where our rows lie among all sites of the batch (n,), ascending."""
        return self._sorted[0]

    @property
    def _engine_rows(self) -> Tensor:
        """The engine's row of each of ours (n,)."""
        return self._sorted[1]

    @cached_property
    def _our_rows(self) -> Tensor:
        """Our row of each of the engine's (n,)."""
        return self._engine_rows.argsort()

    @cached_property
    def _neighbours(self) -> Tensor:
        """The depthwise convolutions' kernel map as a table of our rows, int64 (49, n), n where there is none."""
        num_rows, device = len(self._our_rows), self._our_rows.device
        with _calling(device):
            kernel_map = self.manager.kernel_map(self.key, self.key, stride=1, kernel_size=KERNEL_SIZE)
            offset = torch.cat([torch.full((pairs.shape[1],), j, device=device) for j, pairs in kernel_map.items()])
            source, target = self._our_rows[torch.cat(list(kernel_map.values()), 1).long()]
            table = torch.full((KERNEL_SIZE**2, num_rows), num_rows, device=device)
            table[offset, target] = source
        return table

    def _rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.num_images, -1))

    def gather(self, dense: Tensor) -> Tensor:
        return self._rows(dense.flatten(0, 2).index_select(0, self._positions))

    def scatter(self, x: Tensor) -> Tensor:
        h, w = self.grid
        dense = x.new_zeros(self.num_images * h * w, x.shape[-1])
        return dense.index_copy(0, self._positions, x.flatten(0, 1)).unflatten(0, (self.num_images, h, w))

    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        s = conv.weight.shape[-1]
        windows = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=s, q=s)
        return F.linear(self.gather(windows), conv.weight.flatten(1), conv.bias)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        assert conv.bias is not None
        assert conv.kernel_size == (KERNEL_SIZE, KERNEL_SIZE)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = conv.weight.permute(3, 2, 0, 1).flatten(0, 1).squeeze(-1)  # (c, 1, kh, kw) -> (kw * kh, c)
        out = gather_depthwise(x.flatten(0, 1).to(dtype), weight.to(dtype), conv.bias.to(dtype), self._neighbours)
        return self._rows(out).to(conv.weight.dtype)

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        engine = import_engine()
        backend = importlib.import_module("MinkowskiEngineBackend._C")
        mode = backend.ConvolutionMode.DIRECT_GEMM if x.is_cuda else backend.ConvolutionMode.DEFAULT
        dtype = torch.promote_types(x.dtype, torch.float32)
        s = conv.weight.shape[-1]
        weight = conv.weight.permute(3, 2, 1, 0).flatten(0, 1)  # (o, i, kh, kw) -> (kw * kh, i, o)
        rows = x.flatten(0, 1).index_select(0, self._our_rows).to(dtype)
        with _calling(x.device):
            coarse_key = self.manager.stride(self.key, s)
            generator = engine.KernelGenerator(kernel_size=s, stride=s, dimension=2)
            out = engine.MinkowskiConvolutionFunction.apply(
                rows, weight.to(dtype), generator, mode, self.key, coarse_key, self.manager
            )
        grid = (self.grid[0] // s, self.grid[1] // s)
        coarser = type(self)(grid, self.num_images, self.manager, coarse_key, self.stride * s)
        out = out.index_select(0, coarser._engine_rows)
        if conv.bias is not None:
            out = out + conv.bias
        return coarser._rows(out).to(conv.weight.dtype), coarser

    @property
    def num_active(self) -> int:
        return len(self._positions) // self.num_images
