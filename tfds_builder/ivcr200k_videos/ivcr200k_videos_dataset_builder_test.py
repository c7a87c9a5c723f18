"""TFDS's own checks of the builder. They read through tf.data, which knows TFRecord and not ArrayRecord."""

import pytest

pytest.importorskip("tensorflow", reason="TFDS's test case needs the build extra")

import tensorflow_datasets as tfds

from tfds_builder.ivcr200k_videos import ivcr200k_videos_dataset_builder


@pytest.mark.slow
class Ivcr200kVideosTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = ivcr200k_videos_dataset_builder.Builder
    BUILDER_CONFIG_NAMES_TO_TEST = ["16x96"]
    SPLITS = {"corpus": 8}
    # The check replaces all of `os`, which the pool of decoding threads asks for the number of cores.
    MOCK_OUT_FORBIDDEN_OS_FUNCTIONS = False

    def _make_builder(self, config=None):
        return self.dataset_class(data_dir=self.tmp_dir, config=config, file_format="tfrecord")


if __name__ == "__main__":
    tfds.testing.test_main()
