# Each command does everything on a fresh machine with Python 3.11 (or later) and make:
#   make demo           synthesise the embedded corpus, train CPC-CTC on it, show what was learned
#   make test           the linter and all tests; those of optional libraries are skipped
#   make test-extras    tests of the optional libraries in requirements-extras.txt
PYTHON ?= python3
DEMO ?= demo
RUN = .venv/bin/python
EXTRAS = .venv-extras/bin/python

.PHONY: demo test test-extras clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

# A second environment, in which .venv is visible: PyTorch isn't installed twice.
.venv-extras/installed: requirements-extras.txt .venv/installed
	$(RUN) -m venv --clear --without-pip .venv-extras
	$(RUN) -c "$(SITE)" > `$(EXTRAS) -c "$(SITE)"`/venv.pth
	$(EXTRAS) -m pip install --quiet --disable-pip-version-check \
		--constraint requirements.txt --requirement requirements-extras.txt
	touch $@
SITE = import sysconfig; print(sysconfig.get_path('purelib'))

# The demo's model is small, so that it learns in minutes on two cores; its CPC-CTC flags are those
# of the README's example.
CORPUS = --pathDB $(DEMO)/corpus/audio --pathTrain $(DEMO)/corpus/train_split.txt \
	--pathVal $(DEMO)/corpus/test_split.txt --path_phone_data $(PHONES)
PHONES = $(DEMO)/corpus/converted_aligned_phones.txt
MODEL = --nPredicts 8 --CPCCTC --CPCCTCNumMatched 12 --CPCCTCSelfLoop --CPCCTCSkipBeg 1 \
	--CPCCTCSkipEnd 2 --rnnMode linear --hiddenEncoder 64 --hiddenGar 96 --arMode GRU
TRAINING = --sizeWindow 10240 --learningRate 2e-3 --nEpoch 6 --random_seed 1 \
	--logging_step 200
PROBES = --supervised_classif_metric --speaker_sep --linsep_classif_each_epochs 5 \
	--linsep_lr 1e-2 --linsepBatchSizeGPU 32 --linsep_logs_dir $(DEMO)/probes
CAPTURE = --pathCaptureDS $(DEMO)/corpus/test_split.txt --captureDStotNr 8 --captureEachEpochs 5 \
	--captureEverything --pathCaptureSave $(DEMO)/captures
UNTRAINED = $(RUN) eval/linear_separability.py $(DEMO)/corpus/audio \
	$(DEMO)/corpus/train_split.txt $(DEMO)/corpus/test_split.txt $(DEMO)/run/checkpoint_0.pt \
	--no_pretraining --lr 1e-2 --batchSizeGPU 32 --random_seed 1

demo: .venv/installed
	$(RUN) utils/corpus/make_demo.py $(DEMO)/corpus
	$(RUN) train.py --pathCheckpoint $(DEMO)/run $(CORPUS) $(MODEL) $(TRAINING) $(PROBES) $(CAPTURE)
	@echo; echo "the same probes on the same network with random weights:"
	@$(UNTRAINED) --pathPhone $(PHONES) --pathCheckpoint $(DEMO)/untrained/phone
	@$(UNTRAINED) --pathCheckpoint $(DEMO)/untrained/speaker
	$(RUN) utils/report/plot_capture.py $(DEMO)/captures/5 --windows 0 3 \
		--phones $(DEMO)/corpus/phones.txt --out $(DEMO)/pictures
	@echo
	@$(RUN) utils/report/summary.py $(DEMO)/run \
		--untrained $(DEMO)/untrained/phone $(DEMO)/untrained/speaker \
		--pictures $(DEMO)/pictures

test: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m pytest

test-extras: .venv-extras/installed
	$(EXTRAS) -m pytest tests/extras

clean:
	rm -rf .venv .venv-extras $(DEMO)
