"""TFDS's own checks of the builder. They read through tf.data, which knows TFRecord and not ArrayRecord."""

import pytest

pytest.importorskip("tensorflow", reason="TFDS's test case needs the build extra")

import tensorflow_datasets as tfds

from tfds_builder.ivcr200k import ivcr200k_dataset_builder


@pytest.mark.slow
class Ivcr200kTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = ivcr200k_dataset_builder.Builder
    SPLITS = {"train": 4, "test": 3}

    def _make_builder(self, config=None):
        return self.dataset_class(data_dir=self.tmp_dir, config=config, file_format="tfrecord")


if __name__ == "__main__":
    tfds.testing.test_main()
