"""Many pictures in one run: of each prompt, at each weight of an image prompt, from each noise."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import NamedTuple

from PIL import Image

from files.sheets import sheet
from generate.models import Models
from generate.picture import BATCH, pictures
from generate.prompt import scaled
from ipadapter import Prompt, Seen

SIDE = 256  # pixels of a picture on a sheet, at most


class Job(NamedTuple):
    """One picture of a run."""

    prompt: int  # which of the prompts
    scale: float  # of the image prompt that is swept
    seed: int
    number: int  # among all: prompt by prompt, of each weight by weight, of each seed by seed
    seen: Seen | None = None  # where its prompt acted, if that is asked for


@dataclass(frozen=True)
class Sweep:
    """What is to be made: of each of so many prompts, at each scale, so many pictures."""

    prompts: int = 1
    # The weights of one group of image prompts.
    scales: Sequence[float] = (1.0,)
    # Which group.
    group: int = 0
    # Picture j of each is made from the noise of seed + j.
    seed: int = 0
    count: int = 1
    # How many prompts go through the UNet as one batch; more than one only where `count` is 1.
    together: int = 1

    def __len__(self) -> int:
        return self.prompts * self.each

    @property
    def each(self) -> int:
        """Pictures of one prompt."""
        return len(self.scales) * self.count

    @property
    def parts(self) -> list[range]:
        """The prompts that go through the UNet as one batch."""
        return [range(i, min(i + self.together, self.prompts)) for i in range(0, self.prompts, self.together)]

    def batches(self, low_memory: bool = False) -> int:
        """How often all steps are run."""
        return len(self.parts) * len(self.scales) * -(-self.count // (1 if low_memory else BATCH))

    def jobs(self, part: range) -> Iterator[Job]:
        """In the order in which they are made."""
        for k, scale in enumerate(self.scales):
            for i in part:
                for j in range(self.count):
                    yield Job(i, scale, self.seed + j, i * self.each + k * self.count + j)

    def told(self, groups: Sequence[Mapping[str, object]], scale: float | Sequence[float]) -> list[dict]:
        """What `record` is told of the groups of a picture, their "scale" being lists of one and the swept one's this."""
        return [{**group, "scale": scale if i == self.group else group["scale"][0]} for i, group in enumerate(groups)]


def swept(
    models: Models,
    sweep: Sweep,
    pairs: Iterable[tuple[Prompt, Prompt]],  # each as `prompts` makes it; an iterator is asked for one in its turn
    attention: bool = False,  # whether to look where each prompt acts, which takes time
    **how: object,  # what `pictures` takes besides: `steps`, `guidance_scale`, ...
) -> Iterator[tuple[Job, Image.Image]]:
    """Make the pictures of a sweep, each handed out as soon as it is done.

    Raises:
        UserError: as `pictures` does.
    """
    pairs, seen = iter(pairs), deque()
    watched = {"on_seen": seen.append} if attention else {}
    for part in sweep.parts:
        sides, seeds = next(pairs), sweep.seed
        if len(part) > 1:
            sides = map(Prompt.cat, zip(sides, *islice(pairs, len(part) - 1), strict=True))
            seeds = [sweep.seed] * len(part)
        if len(sweep.scales) > 1:
            sides = ([scaled(side, scale, sweep.group) for scale in sweep.scales] for side in sides)
        made = pictures(models, *sides, seeds, sweep.count, **how, **watched)
        for job, picture in zip(sweep.jobs(part), made, strict=True):
            yield job._replace(seen=seen.popleft()) if attention else job, picture


def sweep_sheet(
    sweep: Sweep,
    # All of them, by their numbers.
    made: Mapping[int, Image.Image],
    # What stands above each column of them, a column for each scale.
    titles: Sequence[str],
    # Shown on the left, from the top: the image prompts, and the picture that all begin with.
    images: Sequence[Image.Image | None] = (),
    begun: Image.Image | None = None,
) -> Image.Image:
    """A column for each scale, a row for each prompt and seed."""
    columns = [[] for _ in sweep.scales]
    for number in range(len(sweep)):
        columns[number % sweep.each // sweep.count].append(made[number])
    for brought, title in ((images, "image prompt"), ([begun] if begun else [], "to begin with")):
        if brought:
            columns, titles = [brought, *columns], [title, *titles]
    return sheet(list(zip_longest(*columns)), titles, min(made[0].width, SIDE))
