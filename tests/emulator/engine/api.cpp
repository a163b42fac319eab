// The C interface that tests/emulator/library.py calls.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "l2.h"
#include "machine.h"

using namespace ptx;

namespace {

struct Loaded {
    std::unique_ptr<Module> module;
    std::map<string, std::unique_ptr<Program>> programs;
    string text;             // of the last answer

    Program& program(const string& name) {
        auto& slot = programs[name];
        if (!slot) slot = decode(*module, *module->functions.at(name));
        return *slot;
    }
};

// Zeros that take memory only where they are touched: the rows of a tensor may lie gigabytes apart, and calloc refuses
// what is more than the machine has.
struct Pages {
    u64 bytes;
    void* at;
    explicit Pages(u64 bytes)
        : bytes(bytes),
          at(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        if (at == MAP_FAILED) throw std::bad_alloc();
    }
    Pages(const Pages&) = delete;
    ~Pages() { munmap(at, bytes); }
};

// Owns the shadow of one region.
struct RegionStore {
    static constexpr u64 kMany = 1 << 24;   // words
    std::unique_ptr<Pages> pages;           // of the cells of so many
    Cell* cells = nullptr;
    u8 *touched = nullptr, *valid = nullptr;
    explicit RegionStore(u64 words) : touched(static_cast<u8*>(calloc(words + 8, 1))) {
        if (words >= kMany) pages = std::make_unique<Pages>((words + 8) * sizeof(Cell));
        cells = static_cast<Cell*>(pages ? pages->at : calloc(words + 8, sizeof(Cell)));
    }
    RegionStore(const RegionStore&) = delete;
    ~RegionStore() {
        if (!pages) free(cells);
        free(touched);
        free(valid);
    }
};

}  // namespace

extern "C" {

struct EmulatorTensor {
    const char* name;
    u64 address, bytes;
    u32 element, pad;
    u8* initialised;         // a byte for each byte, or null: all are
};

struct EmulatorLaunch {
    u32 grid[3], block[3], cluster[3];
    u32 order, seed, perturb, check;
    u64 dynamic_shared, budget, l2_bytes;
    const u8* params;
    u64 param_bytes;
    const EmulatorTensor* tensors;
    u64 tensor_count;
};

}  // extern "C"

namespace {

void add_tensors(Grid& grid, const Loaded& loaded, const EmulatorLaunch& launch) {
    for (u64 t = 0; t < launch.tensor_count; ++t) {
        const EmulatorTensor& from = launch.tensors[t];
        if (!from.bytes) continue;
        grid.tensors.push_back({from.name, from.address, from.address + from.bytes, 0, std::max(1u, from.element)});
    }
    for (const auto& [name, symbol] : loaded.module->symbols) {
        if (symbol.space == Space::shared || !symbol.address) continue;
        grid.tensors.push_back({name, symbol.address, symbol.address + symbol.bytes, 0, 4});
    }
    std::sort(grid.tensors.begin(), grid.tensors.end(), [](const Tensor& a, const Tensor& b) { return a.lo < b.lo; });
}

void add_regions(Grid& grid, vector<std::unique_ptr<RegionStore>>& stores) {
    for (Tensor& tensor : grid.tensors) {
        if (grid.regions.empty() || tensor.lo >= grid.regions.back().hi) {
            grid.regions.push_back({tensor.lo / 4 * 4, tensor.hi, {}});
        }
        grid.regions.back().hi = std::max(grid.regions.back().hi, (tensor.hi + 3) / 4 * 4);
        tensor.region = int(grid.regions.size()) - 1;
    }
    for (Region& region : grid.regions) {
        stores.push_back(std::make_unique<RegionStore>((region.hi - region.lo) / 4));
        region.shadow.cells = stores.back()->cells;
        region.shadow.touched = stores.back()->touched;
    }
}

Region& region_of(Grid& grid, u64 address) {
    for (Region& region : grid.regions) {
        if (address >= region.lo && address < region.hi) return region;
    }
    throw Unsupported("a tensor has no region");
}

// Bytes nobody has written yet, from the caller's maps and back.
void exchange_initialised(Grid& grid, const EmulatorLaunch& launch, vector<std::unique_ptr<RegionStore>>& stores,
                          bool out) {
    for (u64 t = 0; t < launch.tensor_count; ++t) {
        const EmulatorTensor& tensor = launch.tensors[t];
        if (!tensor.initialised || !tensor.bytes) continue;
        Region& region = region_of(grid, tensor.address);
        if (!region.shadow.valid) {
            RegionStore& store = *stores[size_t(&region - grid.regions.data())];
            const u64 words = (region.hi - region.lo) / 4 + 8;
            store.valid = static_cast<u8*>(malloc(words));
            memset(store.valid, 15, words);
            region.shadow.valid = store.valid;
        }
        const u64 start = tensor.address - region.lo;
        for (u64 b = 0; b < tensor.bytes; ++b) {
            u8& word = region.shadow.valid[(start + b) / 4];
            const u8 bit = u8(1 << (start + b) % 4);
            if (out) tensor.initialised[b] = (word & bit) != 0;
            else word = tensor.initialised[b] ? word | bit : word & u8(~bit);
        }
    }
}

void configure(Grid& grid, const EmulatorLaunch& launch) {
    Options& o = grid.options;
    std::copy(launch.grid, launch.grid + 3, o.grid);
    std::copy(launch.block, launch.block + 3, o.block);
    std::copy(launch.cluster, launch.cluster + 3, o.cluster);
    o.order = int(launch.order);
    o.seed = launch.seed;
    o.perturb = launch.perturb;
    o.check = launch.check != 0;
    o.strict = launch.check > 1;
    o.dynamic_shared = launch.dynamic_shared;
    o.budget = launch.budget;
    o.l2_bytes = launch.l2_bytes;
    grid.params.assign(launch.params, launch.params + launch.param_bytes);
    grid.params.resize(std::max<u64>(launch.param_bytes, grid.program->param_bytes) + 16);
}

void copy_stats(const Stats& stats, u64* out) { memcpy(out, &stats, sizeof stats); }

}  // namespace

extern "C" {

// A module, or null; *message then says why. The text lives as long as the module or until the next call.
void* emulator_load(const char* ptx, const char** message) {
    static thread_local string error;
    try {
        auto loaded = std::make_unique<Loaded>();
        loaded->module = parse(ptx);
        return loaded.release();
    } catch (const std::exception& e) {
        error = e.what();
        *message = error.c_str();
        return nullptr;
    }
}

void emulator_free(void* module) { delete static_cast<Loaded*>(module); }

// One line a kernel: name threads cluster_x cluster_y cluster_z [offset:bytes ...]; first the architecture.
const char* emulator_describe(void* module) {
    auto& loaded = *static_cast<Loaded*>(module);
    loaded.text = std::to_string(loaded.module->arch) + "\n";
    for (const auto& [name, f] : loaded.module->functions) {
        if (!f->entry) continue;
        loaded.text += name + " " + std::to_string(f->required_threads);
        for (u32 c : f->cluster) loaded.text += " " + std::to_string(c);
        u64 offset = 0;
        for (const Symbol& p : f->params) {
            offset = (offset + p.align - 1) / p.align * p.align;
            loaded.text += " " + std::to_string(offset) + ":" + std::to_string(p.bytes);
            offset += p.bytes;
        }
        loaded.text += "\n";
    }
    return loaded.text.c_str();
}

// 0: done; 1: a violation; 2: not supported. *message says what.
int emulator_launch(void* module, const char* kernel, const EmulatorLaunch* launch, u64* stats, const char** message) {
    auto& loaded = *static_cast<Loaded*>(module);
    int result = 0;
    Grid grid;
    vector<std::unique_ptr<RegionStore>> stores;
    try {
        grid.program = &loaded.program(kernel);
        configure(grid, *launch);
        add_tensors(grid, loaded, *launch);
        add_regions(grid, stores);
        exchange_initialised(grid, *launch, stores, false);
        run_grid(grid);
        exchange_initialised(grid, *launch, stores, true);
    } catch (const Violation& e) {
        loaded.text = e.what();
        result = 1;
    } catch (const std::exception& e) {
        loaded.text = e.what();
        result = 2;
    }
    copy_stats(grid.stats, stats);
    *message = loaded.text.c_str();
    return result;
}

// Bytes of static shared memory and warp instructions by source line of the last launch: "bytes\nfile:line times\n..."
const char* emulator_profile(void* module, const char* kernel) {
    auto& loaded = *static_cast<Loaded*>(module);
    Program& program = loaded.program(kernel);
    std::map<string, u64> lines;
    for (const Instr& i : program.code) {
        if (i.pc < program.executed.size()) lines[place_of(program, i.pc)] += program.executed[i.pc];
    }
    loaded.text = std::to_string(program.static_end - program.shared_base) + "\n";
    for (const auto& [line, times] : lines) loaded.text += line + "\t" + std::to_string(times) + "\n";
    return loaded.text.c_str();
}

}  // extern "C"
