"""Named models: the values of ``MODEL=``, and the checkpoint that each uses by default."""

from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import UnknownNameError

_MODELS_FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by name. ``bundled`` names the small checkpoint that comes with the package, in ``trt_kv/models``.

    ``hub_id`` is a full-size checkpoint of the same architecture that a user may want to pass instead.
    """

    name: str
    summary: str
    bundled: str
    hub_id: str

    @property
    def bundled_folder(self) -> Path:
        """Path of the bundled checkpoint in this installation."""
        return _MODELS_FOLDER / self.bundled


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="llama3",
            summary="Llama 3 architecture; bundled: 4.5 M parameters, trained on synthetic English",
            bundled="llama3-tiny",
            hub_id="meta-llama/Llama-3.1-8B-Instruct",
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called ``name``. Raises ``UnknownNameError``, which lists the known ones."""
    if name not in PRESETS:
        raise UnknownNameError("model", name, PRESETS)
    return PRESETS[name]


def is_bundled(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint that comes with the package."""
    return folder.resolve().parent == _MODELS_FOLDER.resolve()
