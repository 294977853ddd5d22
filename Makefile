# `make demo` and `make test` on a fresh Debian, as root, need nothing but make.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := worker tasks cli tests bench
export DEBIAN_FRONTEND := noninteractive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint storm fuzz fleet fleet-judge bench bench-podman bench-scale bench-images clean host test-host
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/sandbatch demo

test: $(VENV)/.dev test-host lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# What a host needs, where root is given; without it the tests of hosts skip (in CI they fail).
host: $(VENV)/.installed
	@if [ "$$(id -u)" = 0 ]; then $(BIN)/sandbatch setup; fi

# What the tests look at a host with. redis-tools has redis-server by another name, and starts none.
TEST_PROGRAMS := nft:nftables ip:iproute2 podman:podman runc:runc busybox:busybox-static chromium:chromium chromedriver:chromium-driver redis-check-rdb:redis-tools debootstrap:debootstrap curl:curl ps:procps cc:gcc,libc6-dev
test-host: host
	@for one in $(TEST_PROGRAMS); do \
	  command -v $${one%%:*} >/dev/null || [ "$$(id -u)" != 0 ] || apt-get -qq install -y --no-install-recommends $$(echo $${one##*:} | tr , ' ') >/dev/null || exit 1; \
	done
	@[ "$$(id -u)" != 0 ] || command -v docker-registry >/dev/null || $(MAKE) -s $(BIN)/docker-registry
	@[ "$$(id -u)" != 0 ] || command -v promtool >/dev/null || $(MAKE) -s $(BIN)/promtool
	@[ "$$(id -u)" != 0 ] || $(MAKE) -s $(COMPOSE)/docker-compose $(VENV)/runsc/debian/runsc $(VENV)/runsc/newest/runsc

# Only its program: on a machine with systemd the package would start a registry on port 5000.
$(BIN)/docker-registry:
	@folder=$$(mktemp -d) && cd $$folder && apt-get -qq download docker-registry && dpkg-deb -x docker-registry_*.deb . && \
	  cp usr/bin/docker-registry $(CURDIR)/$@ && rm -r $$folder

# The same: the package would start a Prometheus on port 9090.
$(BIN)/promtool:
	@folder=$$(mktemp -d) && cd $$folder && apt-get -qq download prometheus && dpkg-deb -x prometheus_*.deb . && \
	  cp usr/bin/promtool $(CURDIR)/$@ && rm -r $$folder

# The two runscs that tests/contain judges: Debian 13's, and gVisor's newest, built where Go is.
NEWEST_RUNSC := gvisor.dev/gvisor/runsc@v0.0.0-20260905035102-160fafc42237
DEBIAN13 := $(VENV)/debian13
$(DEBIAN13)/.unpacked:
	@rm -rf $(DEBIAN13) && tests/debian13.sh $(CURDIR)/$(DEBIAN13) runsc docker-compose && touch $@

$(VENV)/runsc/debian/runsc: $(DEBIAN13)/.unpacked
	@mkdir -p $(@D) && cp $(DEBIAN13)/usr/bin/runsc $@

$(VENV)/runsc/newest/runsc:
	@command -v go >/dev/null || { echo "make: no Go, so that tests/contain lacks the newest runsc" >&2; exit 0; }; \
	  mkdir -p $(@D) && GOBIN=$(CURDIR)/$(@D) CGO_ENABLED=0 go install $(NEWEST_RUNSC)

# Docker's own compose (Debian 13's), and what podman needs for it.
# Unpacked alone: with netavark installed podman would take it for the networks of every other test.
COMPOSE := $(VENV)/compose
$(COMPOSE)/docker-compose: $(DEBIAN13)/.unpacked
	@folder=$$(mktemp -d) && cd $$folder && apt-get -qq download netavark aardvark-dns catatonit && \
	  for one in *.deb; do dpkg-deb -x $$one . || exit 1; done && mkdir -p $(CURDIR)/$(COMPOSE) && \
	  cp usr/lib/podman/* usr/bin/catatonit $(CURDIR)/$(COMPOSE) && rm -r $$folder && \
	  cp $(CURDIR)/$(DEBIAN13)/usr/libexec/docker/cli-plugins/docker-compose $(CURDIR)/$@

# Kills, hangs and full ranges by a seed; exit 0 only if nothing is left over, lost or doubled.
SEED ?=
KILLS ?= 1000
storm: $(VENV)/.dev test-host
	$(BIN)/python -m tests.storm --kills $(KILLS) $(if $(SEED),--seed $(SEED))

# Changed bytes for all that reads some, RUNS for each reader; exit 0 only if none failed in another way than it says.
RUNS ?= 5000
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --runs $(RUNS) $(if $(SEED),--seed $(SEED))

# Several hosts on this machine, to look at: each in namespaces of its own, with a prompt to cut, kill and reboot them.
HOSTS ?= 8
fleet: $(VENV)/.dev test-host
	@$(BIN)/python -m tests.hosts --hosts $(HOSTS)

# A batch over all of them while one loses its power, one its cable, and one is drained; exit 0 only if all is well.
SANDBOXES ?= 400
fleet-judge: $(VENV)/.dev test-host
	@$(BIN)/python -m tests.hosts.judged --hosts $(HOSTS) --sandboxes $(SANDBOXES)

bench: $(VENV)/.dev host
	$(BIN)/python -m bench.launch

# The same launches by podman; and LIVE sandboxes over four hosts of this machine, SPECS in the queue.
bench-podman: $(VENV)/.dev test-host
	$(BIN)/python -m bench.podman

LIVE ?= 1000
SPECS ?= 10000
bench-scale: $(VENV)/.dev test-host
	$(BIN)/python -m bench.scale --live $(LIVE) --specs $(SPECS)

# Launches of an image beside those of the host's own programs; COLD sandboxes of one that must be pulled first.
COLD ?= 50
bench-images: $(VENV)/.dev test-host
	$(BIN)/python -m bench.images --cold $(COLD)

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  [ "$$(id -u)" = 0 ] || { echo "make: python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }; \
	  apt-get -qq update && apt-get -qq install -y --no-install-recommends python3 python3-venv >/dev/null; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is older than 3.11: set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist bench/out *.egg-info .mypy_cache .ruff_cache .pytest_cache
