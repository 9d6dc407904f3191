"""Published data sets: miniature copies of each layout become the manifest and the suite that they are; what is wrong is one line each."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from configs import stage1
from configs.errors import RequestError
from data_pipelines import clips, layouts, public
from data_pipelines.layouts import Left, Options, Pair
from data_pipelines.manifest import read_manifest, require_inside
from evaluation import suites


def clip(path):
    """A grey clip, another one for each name."""
    shade = sum(map(ord, path.name)) % 200
    clips.write_clip(path, np.full((9, 16, 24, 3), shade, np.uint8), 8)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 24, 3), 90, np.uint8)).save(path)


def write_table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def vap_row(name, kind, references, split="train", score=90, folder="vfx_videos"):
    paths = json.dumps([f"{folder}/{each}.mp4" for each in references])
    path, caption = f"{folder}/{name}.mp4", f"a {name},\nand more"
    return {"video_paths": path, "kind": kind, "ref_video_paths": paths, "split": split, "tar_video_caption": caption} | {
        "reference_alignment_score": score
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The four data sets, two to four clips each."""
    root = tmp_path_factory.mktemp("sets")
    vap = root / "VAP-Data"
    for name in ("vfx_videos/a", "vfx_videos/b", "vfx_videos/c", "vfx_videos_hq_camera/d", "vfx_videos_hq_camera/e"):
        clip(vap / f"{name}.mp4")
    write_table(
        vap / "vap_data.csv",
        vap_row("a", "cake", ["a", "b", "c"]),
        vap_row("b", "cake", ["a"]),
        vap_row("c", "cake", ["a"], split="test"),
        vap_row("d", "orbit", ["e"], folder="vfx_videos_hq_camera"),
        vap_row("e", "orbit", ["d"], folder="vfx_videos_hq_camera"),
        vap_row("poor", "cake", ["a"], score=5),
    )
    write_table(
        vap / "benchmark" / "benchmark.csv",
        dict(video_paths="vfx_videos/a.mp4", ref_video_path="vfx_videos/b.mp4", tar_video_caption="new", ref_video_caption="shown"),
    )
    camera = root / "CameraClone-Dataset"
    for name in ("scene1_01", "scene550_01"):
        clip(camera / "data" / "0316" / "traj_1_01" / f"{name}.mp4")
    picture(camera / "frames" / "000.jpg")
    reference, target = (f"data/0316/traj_1_01/{name}.mp4" for name in ("scene1_01", "scene550_01"))
    row = dict(video_path=f"CameraClone-Dataset/{target}", caption="a street", ref_video_path=reference, content_video_path=target)
    write_table(camera / "CamCloneDataset.csv", row)
    test = dict(ref_video_path=reference, content_video_path=target, caption="a tower", first_frame_path="frames/000.jpg")
    write_table(camera / "test.csv", test)
    vfx = root / "VFXMaster_datasets"
    for name in ("melt/1", "melt/2", "burn/3", "burn/4"):
        clip(vfx / f"{name}.mp4")
    (vfx / "info.json").write_text(
        json.dumps([{"video": f"{name}.mp4", "prompt": name} for name in ("melt/1", "burn/3", "melt/2", "burn/4")])
    )
    case = root / "MTBench" / "dog-agility"
    clip(case / "videos" / "dog-agility.mp4")
    clip(case / "videos" / "tracker.mp4")
    picture(case / "first_frame.jpg")
    picture(case / "masks" / "dog-agility" / "00000.png")
    (case / "eval_prompts.txt").write_text("A robot jumps.  \nA cat jumps.")
    (case / "prompts.txt").write_text("A dog jumps.")
    return root


def run(monkeypatch, capsys, *args):
    """Exit code, and what is printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["public", *map(str, args)])
    try:
        code = public.main() or 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def manifest_of(monkeypatch, capsys, root, layout, *args):
    """The rows of the manifest as launch.encode reads it, files from the root on."""
    out = root / f"{layout}.jsonl"
    code, printed, error = run(monkeypatch, capsys, f"--layout={layout}", f"--root={root}", f"--out={out}", *args)
    assert code == 0, error
    rows = read_manifest(out)
    require_inside(rows, root)
    found = [(row.id, row.task, *(path.resolve().relative_to(root).as_posix() for path in row.files.values()), row.prompt) for row in rows]
    return found, printed


def test_vap_data_becomes_a_manifest(sets, monkeypatch, capsys):
    rows, printed = manifest_of(monkeypatch, capsys, sets / "VAP-Data", "vap_data")
    camera = "vfx_videos_hq_camera"
    assert rows == [
        ("0000003-a", "effect", "vfx_videos/b.mp4", "vfx_videos/a.mp4", "a a,\nand more"),
        ("0000005-b", "effect", "vfx_videos/a.mp4", "vfx_videos/b.mp4", "a b,\nand more"),
        ("0000009-d", "camera", f"{camera}/e.mp4", f"{camera}/d.mp4", "a d,\nand more"),
        ("0000011-e", "camera", f"{camera}/d.mp4", f"{camera}/e.mp4", "a e,\nand more"),
    ]
    assert "left out:" not in printed
    assert "--check\n" in printed


def test_kinds_splits_and_references_are_chosen(sets, monkeypatch, capsys):
    args = ("--tasks", "cake=style", "cak=id", "--split=all", "--references=2")
    rows, printed = manifest_of(monkeypatch, capsys, sets / "VAP-Data", "vap_data", *args)
    assert [row[:3] for row in rows[:4]] == [
        ("0000003-a", "style", "vfx_videos/b.mp4"),
        ("0000003.1-a", "style", "vfx_videos/c.mp4"),
        ("0000005-b", "style", "vfx_videos/a.mp4"),
        ("0000007-c", "style", "vfx_videos/a.mp4"),
    ]
    assert "left out: --tasks: cak: no row has this kind or folder" in printed


VFX_IDS = ("0000001-1", "0000003-2", "0000002-3", "0000004-4")  # by effect


def test_cameraclone_and_vfxmaster_become_manifests(sets, monkeypatch, capsys):
    rows, _ = manifest_of(monkeypatch, capsys, sets / "CameraClone-Dataset", "cameraclone")
    folder = "data/0316/traj_1_01"
    assert rows == [("0000002-scene550_01", "camera", f"{folder}/scene1_01.mp4", f"{folder}/scene550_01.mp4", "a street")]
    rows, _ = manifest_of(monkeypatch, capsys, sets / "VFXMaster_datasets", "vfxmaster")
    assert rows == [
        ("0000001-1", "effect", "melt/2.mp4", "melt/1.mp4", "melt/1"),
        ("0000003-2", "effect", "melt/1.mp4", "melt/2.mp4", "melt/2"),
        ("0000002-3", "effect", "burn/4.mp4", "burn/3.mp4", "burn/3"),
        ("0000004-4", "effect", "burn/3.mp4", "burn/4.mp4", "burn/4"),
    ]


@pytest.mark.parametrize(
    ("layout", "folder", "args", "expected", "kinds"),
    [
        ("vap_data", "VAP-Data", (), [("0000002-a", "effect", "new", "shown")], {"vfx_videos/b.mp4"}),
        ("cameraclone", "CameraClone-Dataset", (), [("0000002-scene550_01", "camera", "a street", "")], {"traj_1_01"}),
        ("cameraclone", "CameraClone-Dataset", ("--file=test.csv",), [("0000002-000", "camera", "a tower", "")], {"traj_1_01"}),
        ("vfxmaster", "VFXMaster_datasets", ("--columns", "prompt=none"), [(name, "effect", "", "") for name in VFX_IDS], {"melt", "burn"}),
        (
            "mtbench",
            "MTBench",
            (),
            [(f"dog-agility-p{i}", "motion", f"A {who} jumps.", "A dog jumps.") for i, who in enumerate(("robot", "cat"))],
            {"dog-agility/videos/dog-agility.mp4"},
        ),
    ],
)
def test_suites_are_what_launch_evaluate_reads(sets, tmp_path, monkeypatch, capsys, layout, folder, args, expected, kinds):
    out = tmp_path / "new" / "suite.jsonl"
    code, _, error = run(monkeypatch, capsys, f"--layout={layout}", f"--root={sets / folder}", f"--out={out}", "--as=suite", *args)
    assert code == 0, error
    config = stage1.get_config("tiny")
    suite = suites.load(str(out), config)
    assert suite.problems == []
    assert [(case.id, case.task, case.prompt, case.caption) for case in suite.cases] == expected
    assert {case.kind for case in suite.cases} == kinds
    for case in suite.cases:
        assert case.first_frame(config.video).shape == (config.video.height, config.video.width, 3)


def test_mtbench_with_first_frames_for_its_prompts(sets, tmp_path, monkeypatch, capsys):
    args = ("--layout=mtbench", f"--root={sets / 'MTBench'}", f"--out={tmp_path / 's.jsonl'}", "--as=suite", f"--first_frames={tmp_path}")
    picture(tmp_path / "dog-agility-p0.png")
    code, printed, _ = run(monkeypatch, capsys, *args)
    assert code == 2
    assert "left out: dog-agility: needs a first frame for each prompt" in printed
    picture(tmp_path / "dog-agility-p1.jpg")
    assert run(monkeypatch, capsys, *args)[0] == 0
    assert json.loads((tmp_path / "s.jsonl").read_text())["first_frame"] == ["dog-agility-p0.png", "dog-agility-p1.jpg"]


def test_a_pair_that_cannot_be_used_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    for name in ("a", "b", "same"):
        clip(root / f"{name}.mp4")
    clip(tmp_path / "outside.mp4")
    (root / "broken.mp4").write_bytes(b"no clip")
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    columns = ("video_path", "caption", "ref_video_path", "content_video_path")
    targets = ["a", "none", "../outside", "broken", "link", "b"]
    rows = [dict(zip(columns, (f"{name}.mp4", "", "b.mp4", ""), strict=True)) for name in targets]
    write_table(root / "CamCloneDataset.csv", *rows, dict.fromkeys(columns, ""))
    args = ("--layout=cameraclone", f"--root={root}", f"--out={root / 'm.jsonl'}")
    code, printed, _ = run(monkeypatch, capsys, *args)
    assert code == 0
    assert [row.id for row in read_manifest(root / "m.jsonl")] == ["0000002-a"]
    lines = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in lines] == [f"CamCloneDataset.csv:{n}" for n in range(3, 9)]
    for line, reason in zip(
        lines,
        (
            "none.mp4: no such file",
            "outside.mp4: outside",
            "broken.mp4: cannot be decoded",
            "link.mp4: outside",
            "the same clip as the reference",
            "neither video_path nor first_frame_path",
        ),
        strict=True,
    ):
        assert reason in line
    assert "camera          1 kept        5 left out" in printed
    _, printed, _ = run(monkeypatch, capsys, *args, "--allow_outside", "--no_decode")
    assert [row.id for row in read_manifest(root / "m.jsonl")] == ["0000002-a", "0000004-outside", "0000005-broken", "0000006-link"]
    assert printed.endswith("--check --allow_outside\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--layout=vap_data", "--root={}/none"), "none: no such folder; give the folder of the data set"),
        (("--layout=vap_data", "--root={}/MTBench"), "no vap_data.csv in it; give the folder of the set"),
        (("--layout=mtbench", "--root={}/MTBench"), "a test set, its clips have no targets to train on; make a suite: --as=suite"),
        (
            ("--layout=cameraclone", "--root={}/CameraClone-Dataset", "--file=test.csv"),
            "no column for target (video_path); it has ref_video_path",
        ),
        (("--layout=vap_data", "--root={}/VAP-Data", "--columns", "kind=genre"), "no column for kind (genre)"),
        (("--layout=vap_data", "--root={}/VAP-Data", "--columns", "effect=kind"), "effect: vap_data is not read for it"),
        (("--layout=vap_data", "--root={}/VAP-Data", "--tasks", "cake=dance"), "cake=dance: not one of id, style, motion"),
        (("--layout=vap_data", "--root={}/VAP-Data", "--split=nowhere"), "no pair can be used, 0 left out"),
        (("--layout=vap_data", "--root={}/VAP-Data", "--references=0"), "--references=0: 1 or more"),
        (("--layout=vap_data", "--root={}/VAP-Data", "--out={}/x.csv"), "not a name that ends in .jsonl"),
        (("--layout=vapdata", "--root={}/VAP-Data"), "invalid choice: 'vapdata'"),
    ],
)
def test_a_request_that_is_refused(sets, tmp_path, monkeypatch, capsys, args, message):
    out = tmp_path / "out.jsonl"
    given = [f"--out={out}", *(arg.replace("{}", str(sets)) for arg in args)]
    code, _, error = run(monkeypatch, capsys, *given)
    assert code == 2
    assert message in error
    assert error.count("\n") == 2  # of which one is the usage
    assert list(tmp_path.iterdir()) == []


VFX = {"melt": ["melt/1.mp4", "melt/2.mp4"], "burn": ["x/3.mp4", "x/4.mp4"]}


@pytest.mark.parametrize(
    "content",
    [
        [{"video": path, "effect": effect} for effect, paths in VFX.items() for path in paths],
        {"data": [{"file_name": path, "category": effect} for effect, paths in VFX.items() for path in paths]},
        {effect: [{"path": path} for path in paths] for effect, paths in VFX.items()},
        VFX,
        {path: {"label": effect} for effect, paths in VFX.items() for path in paths},
    ],
)
def test_an_info_json_in_any_of_its_forms(tmp_path, content):
    (tmp_path / "info.json").write_text(json.dumps(content))
    found = list(layouts.read_vfxmaster(tmp_path, Options(suite=False)))
    assert [(each.reference, each.target) for each in found if isinstance(each, Pair)] == [
        ("melt/2.mp4", "melt/1.mp4"),
        ("melt/1.mp4", "melt/2.mp4"),
        ("x/4.mp4", "x/3.mp4"),
        ("x/3.mp4", "x/4.mp4"),
    ]


def test_an_info_json_that_does_not_fit(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps([{"clip": "a/1.mp4"}, {"video": "b/1.mp4"}]))
    found = list(layouts.read_vfxmaster(tmp_path, Options(suite=False)))
    assert [each.place for each in found if isinstance(each, Left)] == ["info.json:1", "info.json:2"]
    assert "name the clip's key: --columns target=KEY" in found[0].reason
    assert "the only clip of 'b'" in found[1].reason
    found = list(layouts.read_vfxmaster(tmp_path, Options(suite=False, columns={"target": "clip"})))
    assert [each.place for each in found] == ["info.json:2", "info.json:1"]
    assert "the only clip of 'a'" in found[1].reason
    (tmp_path / "info.json").write_text("[")
    with pytest.raises(RequestError, match="not JSON that can be read"):
        list(layouts.read_vfxmaster(tmp_path, Options(suite=False)))


def test_a_limit_draws_evenly_and_in_order():
    pairs = [Pair("", f"{i:03}", "effect", "", "") for i in range(20)]
    drawn = [[each.id for each in public.drawn(iter(pairs), 5, seed)] for seed in range(400)]
    assert all(len(set(each)) == 5 and each == sorted(each) for each in drawn)
    often = [sum(f"{i:03}" in each for each in drawn) / 400 for i in range(20)]
    assert max(abs(share - 0.25) for share in often) < 0.1  # 4.6 standard deviations of a share of 400
    assert drawn[0] == [each.id for each in public.drawn(iter(pairs), 5, 0)]
