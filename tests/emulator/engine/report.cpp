// What a violation says, and lanes of any width.
#include "machine.h"

namespace ptx {

string place_of(const Program& program, u32 pc) {
    const Statement& st = *program.code[std::min<size_t>(pc, program.code.size() - 1)].source;
    auto file = program.module->files.find(st.file);
    if (file == program.module->files.end() || !st.line) return "`" + st.text.substr(0, 60) + "`";
    string name = file->second.substr(file->second.rfind('/') + 1);
    return name + ":" + std::to_string(st.line);
}

string thread_name(const Grid& grid, u32 global_id) {
    const u32 local = global_id % grid.ids_per_group(), threads = grid.threads_per_group();
    const u32 block = global_id / grid.ids_per_group() * grid.blocks_per_group;
    auto name = [&](u32 thread) {
        const u32 in_block = thread % grid.threads_per_block;
        return "block " + std::to_string(block + thread / grid.threads_per_block) + " warp " +
               std::to_string(in_block / kLanes) + " lane " + std::to_string(in_block % kLanes);
    };
    switch (local / threads) {
    case kThread: return name(local);
    case kCpAsync: return "a cp.async of " + name(local % threads);
    case kBulkRead: case kBulkWrite: return "a bulk copy of " + name(local % threads);
    case kWgmma: return "a wgmma of " + name(local % threads);
    default: return "a copy that completes on an mbarrier of block " + std::to_string(block);
    }
}

void fail(const Warp& w, const Instr& i, int lane, const char* kind, const string& what) {
    const Block& block = *w.block;
    const Program& program = *block.group->grid->program;
    string text = string(kind) + ": " + what + "\n  kernel " + program.function->name + ", " + place_of(program, i.pc);
    text += ", block (" + std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]) + ", " +
            std::to_string(block.index[2]) + "), warp " + std::to_string(w.index) + " lane " + std::to_string(lane);
    text += "\n  " + i.source->text.substr(0, 200);
    throw Violation(text);
}

void lanes_any(const Warp& w, const Operand& o, u64* values) {
    switch (o.width) {
    case 2: {
        const u16* p = lanes_in<u16>(w, o);
        for (int l = 0; l < kLanes; ++l) values[l] = p[l];
        break;
    }
    case 4: {
        const u32* p = lanes_in<u32>(w, o);
        for (int l = 0; l < kLanes; ++l) values[l] = p[l];
        break;
    }
    case 8: memcpy(values, lanes_in<u64>(w, o), 8 * kLanes); break;
    case 16: {
        const u64* p = lanes_in<u64>(w, o);
        for (int l = 0; l < kLanes; ++l) values[l] = p[2 * l];
        break;
    }
    default: {
        u32 mask = predicate(w, o);
        for (int l = 0; l < kLanes; ++l) values[l] = mask >> l & 1;
    }
    }
}

void lanes_any_out(Warp& w, const Operand& o, const u64* values, u32 mask) {
    if (!o.exists) return;
    if (o.width == 8) return lanes_out(w, o, values, mask);
    if (o.width == 4) {
        u32 narrow[kLanes];
        for (int l = 0; l < kLanes; ++l) narrow[l] = u32(values[l]);
        lanes_out(w, o, narrow, mask);
    } else if (o.width == 2) {
        u16 narrow[kLanes];
        for (int l = 0; l < kLanes; ++l) narrow[l] = u16(values[l]);
        lanes_out(w, o, narrow, mask);
    } else if (o.width == 0) {
        u32 bits = 0;
        for (int l = 0; l < kLanes; ++l) bits |= u32(values[l] & 1) << l;
        predicate_out(w, o, bits, mask);
    } else {
        throw Unsupported("a 128-bit register where a narrower one is wanted");
    }
}

}  // namespace ptx
