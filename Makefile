# make             all set-up, then a release build: target/release/tardigrade
# make demo        all set-up, then a guest that is frozen, changed and taken back
# make test        all set-up, then every test
# make check       format and lints
# make bench       the benchmark, beside QEMU and the disk itself
# make fuzz        the fuzzers, SECONDS=60 each, side by side
# make loom        the block engine's own synchronisation, in every order of threads
# make soak        random sequences of saves, loads, deletions and kills for an hour: SOAK_SECONDS, SOAK_SEED
# make fault-test  every step of saves, loads and deletions fails, or is the process's last
# make space-test  a thousand rounds of saves and deletions on one image file
# make crash-test  crash points, faults and kills in numbers: docs/crash-safety.md
# make guest       the guest's kernel and initramfs anew, which are in the repository
.PHONY: all demo test check bench fuzz loom crash-test soak fault-test space-test guest clean

all:
	@scripts/setup.sh build
	cargo build --release --locked

demo:
	@scripts/setup.sh demo
	cargo build --release --locked --package vmm
	target/release/tardigrade demo --shell

# The end-to-end tests run the binary that is built first. nextest runs tests in processes of their
# own, side by side; without it cargo's own runner does the same in threads.
test:
	@scripts/setup.sh test
	cargo build --workspace --locked
	@if cargo nextest --version >/dev/null 2>&1; then \
		echo cargo nextest run --workspace --locked; \
		cargo nextest run --workspace --locked; \
	else \
		echo cargo test --workspace --locked; \
		cargo test --workspace --locked; \
	fi

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

bench:
	@scripts/setup.sh bench
	cargo build --release --locked
	cargo run --release --locked --package bench

SECONDS = 60
fuzz:
	@scripts/setup.sh build
	fuzz/run.sh $(SECONDS)

loom:
	cargo test --package tardigrade-loom --locked

crash-test:
	scripts/crash-test.sh

soak:
	@scripts/setup.sh test
	cargo build --package vmm --locked
	SOAK_SECONDS=$${SOAK_SECONDS:-3600} cargo test --package tardigrade-tests --locked --test soak -- --nocapture

fault-test:
	@scripts/setup.sh test
	cargo build --package vmm --locked
	IO_FAULTS=all cargo test --package tardigrade-tests --locked --test io_faults --test kill_points -- --nocapture

space-test:
	@scripts/setup.sh test
	SPACE_ROUNDS=$${SPACE_ROUNDS:-1000} cargo test --package block --locked --test suite save_and_delete_for_ever -- --nocapture

guest:
	resources/guest/build-kernel.sh
	resources/guest/build-initramfs.sh

clean:
	cargo clean
