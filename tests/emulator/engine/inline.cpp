// The second half of decoding: statements in order, calls replaced by the body of what they call.
#include <algorithm>

#include "decoder.h"

namespace ptx {
namespace {

using Family = bool (*)(Decoder&, const Statement&, Instr&);
const Family kFamilies[] = {
    decode_move,   decode_memory, decode_integer, decode_float, decode_half,     decode_bits,
    decode_compare, decode_convert, decode_special, decode_warp, decode_sync,    decode_atomic,
    decode_copy,   decode_mbarrier, decode_bulk, decode_tensormap, decode_matrix, decode_wgmma,
};

void run_nothing(Warp&, const Instr&, u32) {}

void run_assert(Warp& w, const Instr& i, u32 mask) {
    fail(w, i, __builtin_ctz(mask), "device assert", "an assertion of the kernel failed");
}

void run_trap(Warp& w, const Instr& i, u32 mask) { fail(w, i, __builtin_ctz(mask), "trap", "trap was executed"); }

void note_registers(Instr& i) {
    auto note = [](vector<Operand>& list, const Operand& o) {
        if (o.exists && o.bank == 0) list.push_back(o);
    };
    note(i.writes, i.dst);
    note(i.writes, i.dst2);
    for (const Operand& o : i.src) note(i.reads, o);
    note(i.reads, i.guard);
    for (const Operand& o : i.list) note(i.reads, o);
    for (const Operand& o : i.list2) note(i.reads, o);
    for (const Operand& o : i.reads_c) note(i.reads, o);
    for (const Operand& o : i.list3) note(i.writes, o);
}

}  // namespace

void Decoder::enter(Frame& frame) {
    for (Type type : frame.function->regs) frame.regs.push_back(allocate(type));
    for (const Symbol& symbol : frame.function->symbols) {
        if (symbol.space == Space::shared) {
            frame.symbols.push_back(shared(symbol));
        } else {
            bool param = symbol.space == Space::param;
            frame.symbols.push_back({symbol.space, local(symbol.bytes, symbol.align), param});
        }
    }
}

void Decoder::emit(const Statement& st) {
    Instr i;
    i.source = &st;
    if (st.guard >= 0) {
        i.guard = frame_->regs[st.guard];
        i.guard.negated = st.guard_negated;
    }
    const string& base = st.op[0];
    if (base == "bra" || base == "brx") {
        i.flow = base == "bra" ? Flow::branch : Flow::table;
        i.target = st.target;  // a statement; becomes an instruction when the body is done
        i.targets = st.targets;
        if (base == "brx") i.src[0] = value(st.args[0], Type::u32);
    } else if (base == "ret" || base == "exit") {
        i.flow = Flow::exit;
        if (base == "ret" && calling_.size() > 1) {
            i.flow = Flow::branch;
            return_jumps_.push_back(u32(program_.code.size()));
        }
    } else if (base == "trap" || base == "brkpt") {
        i.run = run_trap;
    } else {
        bool known = false;
        for (Family family : kFamilies) {
            if ((known = family(*this, st, i))) break;
        }
        if (!known || !i.run) throw Unsupported("instruction is not modelled: " + st.text);
    }
    note_registers(i);
    i.pc = u32(program_.code.size());
    program_.code.push_back(std::move(i));
}

void Decoder::bind(const Arg& actual, const Symbol& formal, Frame& callee) {
    if (actual.kind != Arg::symbol) throw Unsupported("an argument of a call must be a .param variable");
    callee.params[formal.name] = location(actual);
}

// call (result), name, (arguments);
void Decoder::call(const Statement& st) {
    const Arg *name = nullptr, *returns = nullptr, *arguments = nullptr;
    for (const Arg& arg : st.args) {
        if (arg.kind == Arg::symbol && !name) name = &arg;
        else if (arg.kind == Arg::paren) (name ? arguments : returns) = &arg;
    }
    if (!name) throw Unsupported("calls through pointers are not modelled: " + st.text);
    auto found = module_.functions.find(name->name);
    if (found == module_.functions.end()) {
        Instr i;
        i.source = &st;
        if (st.guard >= 0) {
            i.guard = frame_->regs[st.guard];
            i.guard.negated = st.guard_negated;
        }
        i.run = name->name == "__assertfail" ? run_assert : run_nothing;
        if (name->name != "__assertfail" && name->name != "vprintf") {
            throw Unsupported("call of a function that is not there: " + name->name);
        }
        i.pc = u32(program_.code.size());
        program_.code.push_back(i);
        return;
    }
    if (st.guard >= 0) throw Unsupported("a call under a predicate is not modelled: " + st.text);
    const Function& f = *found->second;
    Frame callee{&f, {}, {}, {}};
    enter(callee);
    for (size_t k = 0; k < f.params.size(); ++k) bind(arguments->parts.at(k), f.params[k], callee);
    for (size_t k = 0; k < f.returns.size(); ++k) bind(returns->parts.at(k), f.returns[k], callee);
    for (size_t k = 0; k < f.register_params.size(); ++k) {  // the register is the argument's own
        callee.regs[f.register_params[k].reg_id] = value(arguments->parts.at(k), Type::b32);
    }
    for (size_t k = 0; k < f.register_returns.size(); ++k) {
        callee.regs[f.register_returns[k].reg_id] = result(returns->parts.at(k));
    }
    calling_.push_back(f.name);
    vector<u32> outer = std::move(return_jumps_);
    return_jumps_.clear();
    Frame* caller = frame_;
    frame_ = &callee;
    body(callee);
    frame_ = caller;
    for (u32 jump : return_jumps_) program_.code[jump].target = int(program_.code.size());
    return_jumps_ = std::move(outer);
    calling_.pop_back();
}

void Decoder::body(Frame& frame) {
    const vector<Statement>& list = frame.function->body;
    vector<int> starts(list.size() + 1);
    vector<std::pair<u32, u32>> jumps;  // instruction, statement
    for (size_t s = 0; s < list.size(); ++s) {
        starts[s] = int(program_.code.size());
        if (list[s].op[0] == "call") {
            call(list[s]);
        } else {
            emit(list[s]);
            const string& base = list[s].op[0];
            if (base == "bra" || base == "brx") jumps.push_back({u32(program_.code.size()) - 1, u32(s)});
        }
    }
    starts[list.size()] = int(program_.code.size());
    for (auto [at, s] : jumps) {
        program_.code[at].target = starts[list[s].target];
        for (int& target : program_.code[at].targets) target = starts[target];
    }
}

void Decoder::run(const Function& function) {
    program_.module = &module_;
    program_.function = &function;
    program_.shared_base = program_.static_end = module_.arch >= 90 ? 1024 : 0;  // the first KiB is the system's
    layout_shared(function);
    Frame frame{&function, {}, {}, {}};
    for (const Symbol& param : function.params) {
        u64 align = std::max<u64>(1, param.align);
        program_.param_bytes = (program_.param_bytes + align - 1) / align * align;
        program_.param_offsets.push_back(program_.param_bytes);
        frame.params[param.name] = {Space::param, program_.param_bytes, false};
        program_.param_bytes += param.bytes;
    }
    calling_ = {function.name};
    frame_ = &frame;
    enter(frame);
    body(frame);
    Instr end;
    end.flow = Flow::exit;
    static const Statement kEnd{"(end of the kernel)", {"ret"}, {}, -1, false, -1, 0, 0, {}};
    end.source = &kEnd;
    end.pc = u32(program_.code.size());
    program_.code.push_back(end);
    program_.local_bytes = (program_.local_bytes + 15) / 16 * 16;
}

std::unique_ptr<Program> decode(const Module& module, const Function& function) {
    auto program = std::make_unique<Program>();
    Decoder(module, *program).run(function);
    order_by_joins(program->code);
    program->align_constants();
    return program;
}

void Program::align_constants() {
    const vector<u8> values = constants;
    constants.resize(values.size() + 64);
    memcpy(constant_base(), values.data(), values.size());
}

}  // namespace ptx
