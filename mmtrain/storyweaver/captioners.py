"""V_cap of eq. (1) and (5), who puts a picture in words: the texts beside it, or a model from a local folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.config_errors import UserError
from mmtrain.story import StoryFault
from mmtrain.storyweaver.scene import DESCRIBE_CHARACTER

TASK = "image-text-to-text"
LONGEST = 256  # tokens of an answer


class FileCaptioner:
    """The benchmark's own texts, first lines of files.

    <world>/image/<group>/<n>.png has its caption in <world>/caption/<group>/<n>.txt; what a portrait of a character
    shows stands in <world>/character/<group>.txt.

    Args:
        captions: files of pictures that lie elsewhere, e.g. whose names differ in the case of letters.
    """

    def __init__(self, captions: Mapping[Path, Path] | None = None) -> None:
        self.captions = dict(captions or {})

    def caption(self, image: Path, instruction: str) -> str:
        """The text of a picture, of the character in it if the instruction is DESCRIBE_CHARACTER.

        Raises:
            StoryFault: no such file, no line in it, or no UTF-8 text.
        """
        world = image.parent.parent.parent
        if instruction == DESCRIBE_CHARACTER:
            path = world / "character" / f"{image.parent.name}.txt"
        else:
            path = self.captions.get(image, world / "caption" / image.parent.name / f"{image.stem}.txt")
        try:
            line = path.read_text(encoding="utf-8-sig").strip().partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StoryFault(f"{image}: its text {path} cannot be read: {error}") from error
        if not line:
            raise StoryFault(f"{path}: is empty; one line is wanted")
        return line


class VisionLanguageCaptioner:
    """Any image-text-to-text model of transformers that lies in a local folder; nothing is downloaded.

    Args:
        folder: with config.json, weights, and the processor's files.
        max_new_tokens: longest answer.
        device: "cpu", "cuda:0".
    """

    def __init__(self, folder: str | Path, max_new_tokens: int = LONGEST, device: str = "cpu") -> None:
        self.folder, self.max_new_tokens, self.device = Path(folder).expanduser(), max_new_tokens, device
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"captions: {folder}: no folder of a model (config.json lacks); 'files' takes the texts there"
            )
        self._pipeline: Any = None

    def caption(self, image: Path, instruction: str) -> str:
        """The model's answer to the instruction, in one line.

        Raises:
            UserError: the folder is of no such model.
            StoryFault: the answer is empty.
        """
        message = {
            "role": "user",
            "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": instruction}],
        }
        if self._pipeline is None:
            self._pipeline = self._load()
        options = {
            "max_new_tokens": self.max_new_tokens,
            "return_full_text": False,
            "generate_kwargs": {"do_sample": False},
        }
        if self._pipeline.processor.chat_template:
            answer = self._pipeline(text=[message], **options)
        else:  # models of one turn, BLIP for example, take the picture and a beginning
            answer = self._pipeline(images=str(image), text=instruction, **options)
        text = " ".join(str(answer[0]["generated_text"]).split())
        if not text:
            raise StoryFault(f"{image}: the model of {self.folder} says nothing")
        return text

    def _load(self) -> Any:
        from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline  # takes seconds

        try:
            model, processor = (
                kind.from_pretrained(self.folder, local_files_only=True)
                for kind in (AutoModelForImageTextToText, AutoProcessor)
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"captions: {self.folder}: is no {TASK} model of transformers: {error}") from error
        return pipeline(TASK, model=model, processor=processor, device=self.device)
