// In place of shared/ptx/transpose.cuh.
inline u32 transpose_8x8(u32 pair) {
    const int lane = machine::current->lane;
    machine::slot(lane)[0] = pair;
    machine::sync_warp();
    u32 turned = 0;
    for (int half = 0; half < 2; ++half) {
        const int row = lane % 4 * 2 + half, column = lane / 4;
        turned |= (machine::slot(row * 4 + column / 2)[0] >> column % 2 * 16 & 0xffff) << 16 * half;
    }
    machine::sync_warp();
    return turned;
}
