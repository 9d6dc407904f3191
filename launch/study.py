"""A study with people, blind: pages to rate the clips of launch.evaluate, --scores=DIR --out=DIR; then what came out, --answers=DIR.

    python -m launch.study --scores=out/ours --scores=out/other --out=out/study --raters=20
    python -m launch.study --answers=ANSWERS --out=out/study

The first writes OUT/pages/rater-01.html and so on, one file for each rater, which works from a disk or any web server and loads nothing
else, and OUT/key.json, which stays with you: it alone knows which system made a clip. Every rater judges the same clips, in an order of
their own. A clip is rated from 1 to 5 for fidelity, image consistency and quality; then the clips of two systems are compared. At the
end a rater saves a file and sends it to you.

The second reads these files and prints means with 95 % intervals and the agreement of raters (Krippendorff's alpha, ordinal). It writes
OUT/results.md and OUT/answers.csv, a row an answer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from configs.errors import RequestError, require
from configs.run import Config, VideoConfig
from evaluation import suites, tables, videos
from evaluation.rows import TRANSFER
from evaluation.sampling import path_of
from evaluation.study import answers, page, questions
from evaluation.study.answers import Answer, Key
from evaluation.study.page import Media
from evaluation.suites import Case
from launch import command
from launch.evaluate import ENVIRONMENT, SETTINGS
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.folders.atomic import new_folder, read_json, sha256, write_whole

FLAGS = flags.FlagValues()
SCORES = flags.DEFINE_multi_string("scores", [], "folder of a launch.evaluate; repeats, once for each system", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "folder of pages, key and results", required=True, flag_values=FLAGS)
ANSWERS = flags.DEFINE_string("answers", "", "folder of the files that raters have saved", flag_values=FLAGS)
SUITE = flags.DEFINE_string("suite", "", "the suite that was evaluated, if its file has moved", flag_values=FLAGS)
RATERS = flags.DEFINE_integer("raters", 20, "number of pages", lower_bound=1, flag_values=FLAGS)
CASES = flags.DEFINE_integer("cases", 5, "cases of each task, drawn at random; 0 for all", lower_bound=0, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "of the cases and of every order", lower_bound=0, flag_values=FLAGS)

MOST_BYTES = 200_000_000  # of a page, which a browser has in its memory
KEY, PAGES, RESULTS, TABLE = "key.json", "pages", "results.md", "answers.csv"


class System(NamedTuple):
    """What made the clips of one --scores."""

    name: str
    suite: str
    digest: str | None
    """The SHA-256 of the suite's file; None if it is the world."""
    config: Config
    videos: str
    """The folder of clips that were not sampled here; empty if they were."""

    def path(self, case: Case) -> Path | None:
        """The file of a clip."""
        if self.videos:
            return videos.find(Path(self.videos), case.id)
        path = path_of(Path(self.name), TRANSFER, case)
        return path if path.is_file() else None


def main() -> None:
    require(bool(SCORES.value) != bool(ANSWERS.value), "--scores or --answers: give the first to write pages, the second to read answers")
    if ANSWERS.value:
        analyse(Path(ANSWERS.value), Path(OUT.value or ""))
    else:
        prepare(SCORES.value, Path(OUT.value or ""))


def prepare(folders: Sequence[str], out: Path) -> None:
    """Writes the pages and their key."""
    outputs.require_new_folder("--out", str(OUT.value), folders)
    twice = [name for name in folders if sum(Path(name).resolve() == Path(each).resolve() for each in folders) > 1]
    require(not twice, f"--scores={twice[0] if twice else ''}: given twice; give each system once")
    systems = [system_of(folder) for folder in folders]
    first = systems[0]
    for other in systems[1:]:
        same = other.digest == first.digest and (first.digest is not None or other.suite == first.suite)
        require(same, f"--scores={other.name}: evaluated on {other.suite}, {first.name} on {first.suite}; give systems of one suite")
    chosen, media, digests = draw(suite_of(first), systems)
    asked = [question for case in chosen for question in questions.of_case(case, [system.name for system in systems])]
    digits = len(str(RATERS.value)) if RATERS.value > 9 else 2
    pages = {f"rater-{number:0{digits}}": questions.arranged(asked, SEED.value, number) for number in range(1, RATERS.value + 1)}
    names = tuple(system.name for system in systems)
    parts = [digests, {name: [list(each) for each in arranged] for name, arranged in pages.items()}]
    study = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    with new_folder(out) as folder:
        (folder / PAGES).mkdir()
        for name, arranged in pages.items():
            (folder / PAGES / f"{name}.html").write_bytes(page.write(name, study, arranged, media))
        text = answers.key_content(Key(study, names, pages), suite=first.suite, seed=SEED.value, clips=digests)
        (folder / KEY).write_text(text)
    size = (out / PAGES / f"{next(iter(pages))}.html").stat().st_size
    counts = [sum(len(each.systems) == count for each in asked) for count in (1, 2)]
    print(f"wrote {len(pages)} pages of {size / 1e6:.1f} MB in {out / PAGES}: {counts[0]} clips to rate, {counts[1]} pairs to compare")
    print(f"{out / KEY} says which system made which clip: keep it, and give raters the pages alone")
    print(f"then: python -m launch.study --answers=DIR --out={out}")


def system_of(folder: str) -> System:
    """What a folder of launch.evaluate says of itself; a `RequestError` if it does not."""
    remedy = "give the folder of a finished launch.evaluate"
    for name in (SETTINGS, ENVIRONMENT):
        require(Path(folder, name).is_file(), f"--scores={folder}: no {name} in it; {remedy}")
    settings, about = read_json(Path(folder, SETTINGS), remedy), read_json(Path(folder, ENVIRONMENT), remedy, "suite", "video")
    try:
        config = command.load_config(about["config"], (Config,))
        config = replace(config, video=VideoConfig(**about["video"]), seed=settings.get("seed", config.seed))
        return System(folder, about["suite"]["name"], about["suite"]["sha256"], config, settings.get("videos", ""))
    except (KeyError, TypeError) as error:
        raise RequestError(f"{Path(folder, ENVIRONMENT)}: {error}; {remedy}") from None


def suite_of(system: System) -> suites.Suite:
    """The suite that a system was evaluated on."""
    name, digest = SUITE.value or system.suite, system.digest
    if digest is not None:
        require(Path(name).is_file(), f"--suite={name}: no such file, and {system.name} was evaluated on it; give where it lies now")
        require(sha256(name) == digest, f"--suite={name}: it has changed since {system.name} was evaluated; give the file of then")
    return suites.load(name, system.config)


def draw(suite: suites.Suite, systems: Sequence[System]) -> tuple[list[Case], dict[str, Media], dict[str, dict[str, str]]]:
    """Cases of every task that all systems have a clip of, what is shown of them, and the SHA-256 of their clips by system."""
    random = np.random.default_rng(SEED.value)
    chosen: list[Case] = []
    media: dict[str, Media] = {}
    for task in suite.tasks:
        of_task = [case for case in suite.cases if case.task == task]
        left = CASES.value or len(of_task)
        with tqdm(total=min(left, len(of_task)), desc=task, unit="case", disable=None) as bar:
            for i in random.permutation(len(of_task)):
                if not left:
                    break
                try:
                    media[of_task[i].id] = media_of(of_task[i], systems)
                except RequestError as error:
                    tqdm.write(f"left out: {of_task[i].id}: {error}")
                    continue
                chosen.append(of_task[i])
                size = sum(each.size for each in media.values())
                require(
                    size < MOST_BYTES, f"--cases={CASES.value}: {len(chosen)} of all cases fill a page with {size / 1e6:.1f} MB; give fewer"
                )
                left -= 1
                bar.update()
    require(bool(chosen), f"--scores: the systems have no clip in common; {suite.name} has {len(suite.cases)} cases")
    digests = {system.name: {case.id: sha256(path) for case in chosen if (path := system.path(case))} for system in systems}
    return chosen, media, digests


def media_of(case: Case, systems: Sequence[System]) -> Media:
    """The files of one case; a `RequestError` if one of them cannot be read."""
    size, made = systems[0].config.video, {}
    for system in systems:
        path = system.path(case)
        if path is None:
            raise RequestError(f"{system.name} has no clip of it")
        made[system.name] = page.video(videos.read(path, system.config.video), size.fps)
    frame = page.picture(case.first_frame(size)) if case.first_frame is not None and case.is_temporal else None
    return Media(case.prompt, page.video(case.reference(size), size.fps), frame, made)


def analyse(folder: Path, out: Path) -> None:
    """Prints and writes what the answers say."""
    require(folder.is_dir(), f"--answers={folder}: no such folder; give the one with the files that raters have saved")
    key = answers.read_key(out / KEY)
    found, problems = answers.read(folder, key)
    text = report(key, found, problems)
    write_whole(out / TABLE, answers.write(found))
    write_whole(out / RESULTS, text)
    print(text)
    print(f"wrote {out / RESULTS} and {TABLE}")


def report(key: Key, found: Sequence[Answer], problems: Sequence[str]) -> str:
    """results.md."""
    raters = len({each.rater for each in found})
    about = f"{raters} rater{'s' * (raters != 1)}, {len(found)} answers, {len({each.case for each in found})} cases."
    how = "Means with 95 % bootstrap intervals; references and raters are both drawn, and with one of either alone there is no interval."
    parts: Mapping[str, str] = {
        "Ratings": tables.lines_of(answers.ratings(found, key.systems)),
        "Preferences": tables.lines_of(answers.preferences(found)) if len(key.systems) > 1 else "",
        "Agreement": "1 is perfect, 0 is chance.\n\n" + tables.lines_of(answers.agreement(found)),
        "Absent": tables.bullets(problems),
    }
    return "\n\n".join([f"# Study {key.study}", about, how, *(f"## {name}\n\n{text}" for name, text in parts.items() if text)]) + "\n"


if __name__ == "__main__":
    command.run(main, FLAGS)
