"""Offscreen pictures of a simulated world by EGL, without shadows and reflections, which cost 30 times the rest."""

import ctypes.util
from typing import Any

import mujoco
import numpy as np

from mmtrain.config_errors import UserError

PACKAGES = "libegl1 libegl-mesa0 libgl1-mesa-dri"
SCENE_GEOMS = 200
BOARD_GROUP = 3  # geoms that only collide; left out of pictures


class Pictures:
    """Pictures of one model; `close` when the model is done with.

    Raises:
        UserError: no EGL; names the Debian packages that bring it.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._gl = _egl_context(model.vis.global_.offwidth, model.vis.global_.offheight)
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, SCENE_GEOMS)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = False
        self._option = mujoco.MjvOption()
        self._option.geomgroup[BOARD_GROUP] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def take(self, data: mujoco.MjData, camera: str, width: int, height: int) -> np.ndarray:
        """A picture uint8 [height, width, 3] RGB from a camera of the model.

        Raises:
            UserError: larger than the offscreen buffer.
        """
        largest = self._model.vis.global_
        if width > largest.offwidth or height > largest.offheight:
            raise UserError(
                f"size: pictures of {width} x {height} are larger than the simulator's {largest.offwidth} x "
                f"{largest.offheight}"
            )
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        view = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(view, self._scene, self._context)
        picture = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, view, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the graphics memory."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


def _egl_context(width: int, height: int) -> Any:
    hint = f"pictures need EGL: apt install {PACKAGES} (numbers alone need none: leave `images` empty)"
    if ctypes.util.find_library("EGL") is None:
        raise UserError(hint)
    try:
        from mujoco.egl import GLContext

        return GLContext(width, height)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"{hint}; EGL said: {error}") from error
