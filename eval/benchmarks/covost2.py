"""CoVoST 2, English to German: read sentences of Common Voice, translated (sacreBLEU)."""

from pathlib import Path

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    TAB_SEPARATED,
    first_existing,
    read_hub_table,
    read_parquet_table,
    read_separated,
    spoken_item,
    table_clips,
    unique,
)
from soundwave.eval.items import FileClip, Item

TSV_COLUMNS = ("path", "sentence", "translation", "client_id")
TSV = "covost_v2.en_de.test.tsv"
HUB_COLUMNS = ("id", "sentence", "translation", "audio")


class CoVoST2(Benchmark):
    """The test split of CoVoST 2 En-De.

    The paper names sacreBLEU and no more; text is compared as it is, case kept, tokenizer 13a, as in
    QwenLM/Qwen2-Audio ``eval_audio/evaluate_st.py``, whose prompt form and greedy decoding are used, too.
    """

    name = "covost2_en_de"
    title = "CoVoST2 En-De"
    hub_id = "fixie-ai/covost2"
    homepage = "https://github.com/facebookresearch/covost"
    size = 15_531
    metric = "sacrebleu"
    transcribed = True
    instruction = "Detect the language and translate the speech into German: <|en|>"

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Rows of ``covost_v2.en_de.test.tsv`` (``get_covost_splits.py``) and Common Voice's ``clips``, or parquet."""
        if source is None:
            table = read_hub_table(self.hub_id, HUB_COLUMNS, config="en_de", revision=revision)
        else:
            found = first_existing(source, [TSV, f"en/{TSV}", "en_de"])
            if found.suffix == ".tsv":
                return self._from_tsv(found)
            table = read_parquet_table(found.parent, HUB_COLUMNS, config="en_de")
        items = [
            spoken_item(row["id"], self.instruction, clip, row["translation"], transcript=row["sentence"])
            for row, clip in table_clips(table)
        ]
        return unique(items, source or self.hub_id)

    def _from_tsv(self, tsv: Path) -> list[Item]:
        clips = first_existing(tsv.parent, ["clips", "en/clips"])
        items = [
            spoken_item(
                Path(row["path"]).stem,
                self.instruction,
                FileClip(clips / row["path"]),
                row["translation"],
                transcript=row["sentence"],
            )
            for row in read_separated(tsv, TSV_COLUMNS, **TAB_SEPARATED)
        ]
        return unique(items, tsv)


BENCHMARKS = (CoVoST2(),)
