// Bodies follow with the asynchronous instructions of sm_90.
#include "setup.h"
#include "decoder.h"
namespace ptx {
void check_flights(Warp&, const Instr&, u32) {}
bool decode_wgmma(Decoder&, const Statement&, Instr&) { return false; }
bool decode_mbarrier(Decoder&, const Statement&, Instr&) { return false; }
bool decode_tensormap(Decoder&, const Statement&, Instr&) { return false; }
}
