# The bare-metal guest: a monitor that is told over the serial port which routine to call.
#
# The image is loaded at BASE; what else is where is in layout.rs, which hands the addresses in.
# Code at CPL 0 may be interpreted by KVM, at a millionth of the usual speed: whatever loops over
# memory is a routine for CPL 3, which `user` enters and which ends with UD2.

    .pushsection .rodata.tardigrade_guest, "a", @progbits
    .p2align 12
    .globl tardigrade_guest_start
tardigrade_guest_start:
header:                                 # read by image.rs
    .long entry64 - header
    .long entry32 - header
    .long stubs - header
    .long trampoline - header
    .long trampoline_end - trampoline
    .long (routines_end - routines) / 4
routines:                               # in the order of `Routine` in monitor.rs
    .long peek64 - header
    .long poke64 - header
    .long peek32 - header
    .long poke32 - header
    .long read_msr - header
    .long write_msr - header
    .long port_in - header
    .long port_out - header
    .long receive - header
    .long transmit - header
    .long jump - header
    .long user - header
    .long fill - header
    .long verify - header
    .long find_nonzero - header
    .long count_up - header
    .long watch_time - header
    .long hold - header
    .long triple_fault - header
    .long read_tsc - header
    .long read_cr - header
    .long write_cr3 - header
    .long read_dr - header
    .long write_dr - header
    .long interrupts_on - header
    .long interrupts_off - header
    .long clock - header
    .long transmit_string - header
    .long chain - header
    .long disk_chain - header
    .long dirty - header
    .long trials - header
    .long touch - header
    .long disk_load - header
    .long look - header
routines_end:

# ---- Start ----------------------------------------------------------------------------------

    .code32
# PVH: 32-bit protected mode, no paging.
entry32:
    mov dx, 0x3f8
    mov al, 0x53
    out dx, al
    .byte 0x0f, 0x01, 0x15              # lgdt [gdt_pointer]
    .long {BASE} + gdt_pointer - header
# Also where the trampoline of the other vCPUs goes on.
to_long_mode:
    mov eax, 0x10
    mov ds, eax
    mov ss, eax
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, {PML4}
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER: LME
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033                 # PG, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                          # jmp 0x08:start64
    .long {BASE} + start64 - header
    .word 0x08

    .code64
# The 64-bit boot protocol of Linux. The first thing it does can be seen from outside.
entry64:
    mov edx, 0x3f8
    mov al, 0x53
    out dx, al
    lgdt [rip + gdt_pointer]
    mov eax, {PML4}
    mov cr3, rax
    mov rax, cr4
    or eax, 0x600
    mov cr4, rax
    mov esp, {STACKS}
    push 0x08
    lea rax, [rip + start64]
    push rax
    retfq

# All vCPUs come here: own descriptor tables, and by APIC id a stack and a task.
start64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, 0xfee00020                 # the APIC id, not yet with a stack
    mov eax, [rax]
    shr eax, 24
    mov esp, eax
    inc esp
    shl esp, 14                         # 16 KiB of stack each
    add esp, {STACKS}
    lidt [rip + idt_pointer]
    mov ecx, eax
    shl ecx, 4
    add ecx, 0x30
    ltr cx
    fninit
    test eax, eax
    jz monitor
    jmp mailbox

# The APIC id in eax.
apic_id:
    mov eax, 0xfee00020
    mov eax, [rax]
    shr eax, 24
    ret

# ---- Commands -------------------------------------------------------------------------------

# vCPU 0: a request is five words: routine, four arguments. An answer is 0xa5, a byte that is 0 or
# the vector of an exception plus 1, and a word: what the routine gave, or where the exception was.
monitor:
    mov esp, {STACKS} + 0x4000
    mov edi, {REQUEST}
    mov esi, 40
    call receive
    mov ebx, {REQUEST}
    call dispatch
    xor edx, edx
    call answer
    jmp monitor

# Calls the routine that the request at rbx asks for.
dispatch:
    mov rax, [rbx]
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    mov rdx, [rbx + 24]
    mov rcx, [rbx + 32]
    lea r8, [rip + routines]
    lea r9, [rip + header]
    mov eax, [r8 + rax * 4]
    add rax, r9
    push rbx
    call rax
    pop rbx
    ret

# Sends status dl and value rax.
answer:
    mov edi, {ANSWER}
    mov byte ptr [rdi], 0xa5
    mov [rdi + 1], dl
    mov [rdi + 2], rax
    mov esi, 10
    jmp transmit

# The other vCPUs: a request in memory, with a state behind it. State 1 asks; 2 says that the word
# after it is the answer; 0x100 plus the vector tells of an exception.
mailbox:
    call apic_id
    mov ebx, eax
    shl ebx, 6
    add ebx, {MAILBOXES}
    mov qword ptr [rbx + 40], 2
mailbox_wait:
    pause
    cmp qword ptr [rbx + 40], 1
    jne mailbox_wait
    call dispatch
    mov [rbx + 48], rax
    mov qword ptr [rbx + 40], 2
    jmp mailbox_wait

# ---- Routines at CPL 0 ----------------------------------------------------------------------

peek64:
    mov rax, [rdi]
    ret
poke64:
    mov [rdi], rsi
    ret
peek32:
    mov eax, [rdi]
    ret
poke32:
    mov [rdi], esi
    ret
read_msr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    ret
write_msr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    ret
port_in:
    mov edx, edi
    xor eax, eax
    in al, dx
    ret
port_out:
    mov edx, edi
    mov eax, esi
    out dx, al
    ret

# rsi bytes from the serial port to rdi.
receive:
    mov edx, 0x3fd
receive_wait:
    in al, dx
    test al, 1
    jz receive_wait
    mov edx, 0x3f8
    in al, dx
    mov [rdi], al
    inc rdi
    dec rsi
    jnz receive
    ret

# rsi bytes from rdi to the serial port.
transmit:
    mov edx, 0x3f8
transmit_next:
    mov al, [rdi]
    out dx, al
    inc rdi
    dec rsi
    jnz transmit_next
    ret

# The same with one instruction.
transmit_string:
    mov rcx, rsi
    mov rsi, rdi
    mov edx, 0x3f8
    rep outsb
    ret

jump:
    jmp rdi

# The serial port interrupts from now on when there is input. Not before: the bytes of a request
# would do so too.
listen:
    push rdx
    mov edx, 0x3f9
    mov al, 1
    out dx, al
    pop rdx
    ret

# Runs routine rdi at CPL 3 with three arguments, until its UD2; gives its rax.
user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
    mov r8, rdx
    mov r9, rcx
    mov r10, rsi
    lea r11, [rip + routines]
    mov r11d, [r11 + rdi * 4]
    lea rax, [rip + header]
    add r11, rax
    call set_task_stack
    push 0x23
    lea rax, [rsp - 0x2000]
    push rax
    pushfq
    push 0x2b
    push r11
    mov rdi, r10
    mov rsi, r8
    mov rdx, r9
    iretq
user_done:
    add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# Interrupts from CPL 3 begin where the caller's stack is now. Aligned by count of pushes.
set_task_stack:
    call apic_id
    shl eax, 7
    lea rcx, [rsp + 8]
    mov [rax + {TASKS} + 4], rcx
    ret

# Puts the values at SET in all registers and waits for an interrupt with vector DUMP; at CPL 0 or
# 3, as rdi tells.
hold:
    sub rsp, 8
    call set_task_stack
    call listen
    mov eax, {SET}
    fxrstor64 [rax + 0x200]
    test edi, edi
    jz 1f
    push 0x23
    push qword ptr [rax + 0x80]
    push qword ptr [rax + 0x78]
    push 0x2b
    jmp 2f
1:  push 0x10
    push qword ptr [rax + 0x80]
    push qword ptr [rax + 0x78]
    push 0x08
2:  lea rcx, [rip + held]
    push rcx
    mov rcx, [rax + 0x08]
    mov rdx, [rax + 0x10]
    mov rbx, [rax + 0x18]
    mov rbp, [rax + 0x20]
    mov rsi, [rax + 0x28]
    mov rdi, [rax + 0x30]
    mov r8, [rax + 0x38]
    mov r9, [rax + 0x40]
    mov r10, [rax + 0x48]
    mov r11, [rax + 0x50]
    mov r12, [rax + 0x58]
    mov r13, [rax + 0x60]
    mov r14, [rax + 0x68]
    mov r15, [rax + 0x70]
    mov rax, [rax]
    iretq
held:
    jmp held

# No interrupt table: the next exception ends in shutdown.
triple_fault:
    push 0
    push 0
    lidt [rsp]
    ud2

read_tsc:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

# Control register 0, 2, 3 or 4.
read_cr:
    mov rax, cr0
    test edi, edi
    jz 1f
    mov rax, cr2
    cmp edi, 2
    je 1f
    mov rax, cr3
    cmp edi, 3
    je 1f
    mov rax, cr4
1:  ret
write_cr3:
    mov cr3, rdi
    ret

# Debug register 0 to 3, 6 or 7.
read_dr:
    mov rax, dr0
    test edi, edi
    jz 1f
    mov rax, dr1
    cmp edi, 1
    je 1f
    mov rax, dr2
    cmp edi, 2
    je 1f
    mov rax, dr3
    cmp edi, 3
    je 1f
    mov rax, dr6
    cmp edi, 6
    je 1f
    mov rax, dr7
1:  ret
write_dr:
    cmp edi, 0
    je 10f
    cmp edi, 1
    je 11f
    cmp edi, 2
    je 12f
    cmp edi, 3
    je 13f
    cmp edi, 6
    je 16f
    mov dr7, rsi
    ret
10: mov dr0, rsi
    ret
11: mov dr1, rsi
    ret
12: mov dr2, rsi
    ret
13: mov dr3, rsi
    ret
16: mov dr6, rsi
    ret

# Counts in the first sector of the disk and in memory, until the word at rdi is not 0: reads the
# sector, which must have the number that memory has, and writes the next. At rsi are the structures
# of virtio.rs, with a chain that reads at descriptor 0 and one that writes at 3. Gives 0, or 1 where
# disk and memory disagree, or 2 after an error of the disk.
disk_chain:
    mov r8d, 0xd0000000
1:  cmp qword ptr [rdi], 0
    jne 2f
    xor ecx, ecx
    call disk_request
    jne 4f
    mov rax, [rsi + 0x4000]
    cmp rax, [rsi + 0x5000]
    jne 3f
    inc qword ptr [rsi + 0x4000]
    mov ecx, 3
    call disk_request
    jne 4f
    inc qword ptr [rsi + 0x5000]
    jmp 1b
2:  xor eax, eax
    ret
3:  mov eax, 1
    ret
4:  mov eax, 2
    ret

# Makes the chain at descriptor cx available to the device with registers at r8 and waits until it is used;
# equal if it went well.
disk_request:
    movzx edx, word ptr [rsi + 0x1002]
    mov eax, edx
    and eax, 7
    mov [rsi + rax * 2 + 0x1004], cx
    inc edx
    mov [rsi + 0x1002], dx
    mov dword ptr [r8 + 0x50], 0        # QueueNotify
1:  pause
    cmp [rsi + 0x2002], dx
    jne 1b
    cmp byte ptr [rsi + 0x3010], 0
    ret

interrupts_on:
    sti
    ret
interrupts_off:
    cli
    ret

# Nanoseconds that the kvmclock page at rdi tells (struct pvclock_vcpu_time_info).
clock:
    mov r8d, [rdi]
    test r8d, 1
    jnz clock
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rdi + 8]                  # tsc_timestamp
    movsx ecx, byte ptr [rdi + 28]      # tsc_shift
    test ecx, ecx
    js 1f
    shl rax, cl
    jmp 2f
1:  neg ecx
    shr rax, cl
2:  mov ecx, [rdi + 24]                 # tsc_to_system_mul
    mul rcx
    shrd rax, rdx, 32
    add rax, [rdi + 16]                 # system_time
    cmp r8d, [rdi]
    jne clock
    ret

# Looks at the clock all the time until there is a byte at the serial port; gives the longest gap
# between two looks, in TSC ticks.
watch_time:
    xor r9d, r9d
    rdtsc
    shl rdx, 32
    lea r8, [rdx + rax]
1:  rdtsc
    shl rdx, 32
    or rax, rdx
    mov r10, rax
    sub r10, r8
    cmp r10, r9
    cmova r9, r10
    mov r8, rax
    mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 1b
    mov edx, 0x3f8
    in al, dx
    mov rax, r9
    ret

# A fuzzer's trials: for each byte at the serial port calls `touch`, which is routine rdi, from rsi to rdx,
# and sends what it gives in two bytes, the lower first; until the byte is 0.
trials:
    push rbx
    push rbp
    push r12
    mov ebx, edi
    mov rbp, rsi
    mov r12, rdx
1:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 1b
    mov edx, 0x3f8
    in al, dx
    test al, al
    jz 2f
    mov edi, ebx
    mov rsi, rbp
    mov rdx, r12
    call user
    mov edx, 0x3f8
    out dx, al
    mov al, ah
    out dx, al
    jmp 1b
2:  xor eax, eax
    pop r12
    pop rbp
    pop rbx
    ret

# ---- Routines for CPL 3 ---------------------------------------------------------------------

# Fills rdi to rsi with words made of their address and the seed rdx.
fill:
    movabs rcx, 0x9e3779b97f4a7c15
1:  mov rax, rdi
    imul rax, rcx
    add rax, rdx
    mov [rdi], rax
    add rdi, 8
    cmp rdi, rsi
    jb 1b
    xor eax, eax
    ud2

# The first address of a word that `fill` would have made otherwise, or 0.
verify:
    movabs rcx, 0x9e3779b97f4a7c15
1:  mov rax, rdi
    imul rax, rcx
    add rax, rdx
    cmp [rdi], rax
    jne 2f
    add rdi, 8
    cmp rdi, rsi
    jb 1b
    xor edi, edi
2:  mov rax, rdi
    ud2

# The first address from rdi to rsi of a word that is not 0, or 0.
find_nonzero:
1:  cmp qword ptr [rdi], 0
    jne 2f
    add rdi, 8
    cmp rdi, rsi
    jb 1b
    xor edi, edi
2:  mov rax, rdi
    ud2

# Counts in a register, in the word at rdi, and in the word at rsi that all vCPUs share, until the
# word at rdx is not 0. Gives the count, or -1 if register and memory disagreed.
count_up:
    mov r12, [rdi]
1:  cmp qword ptr [rdx], 0
    jne 2f
    cmp [rdi], r12
    jne 3f
    inc r12
    mov [rdi], r12
    lock inc qword ptr [rsi]
    jmp 1b
2:  mov rax, r12
    ud2
3:  mov rax, -1
    ud2

# Writes numbers that count up to rsi pages from rdi, round and round, each to the first and the last
# word of its page, until the word at rdx is not 0. Each page must have the number of the round before,
# or 0 in the first one. Gives 0, or the address of a page that had another.
chain:
    mov r8, rdi
    mov rcx, rsi
    shl rcx, 12
    add rcx, rdi
    xor eax, eax
1:  cmp qword ptr [rdx], 0
    jne 3f
    inc rax
    mov r9, rax
    sub r9, rsi
    ja 2f
    xor r9d, r9d
2:  cmp [rdi], r9
    jne 4f
    cmp [rdi + 4088], r9
    jne 4f
    mov [rdi], rax
    mov [rdi + 4088], rax
    add rdi, 4096
    cmp rdi, rcx
    jb 1b
    mov rdi, r8
    jmp 1b
3:  xor eax, eax
    ud2
4:  mov rax, rdi
    ud2

# Writes a word to each page from rdi to rsi, round and round, one in as many TSC ticks as the word at
# rdx + 8 says, until the word at rdx is not 0. Gives how many pages it wrote.
dirty:
    mov r8, rdi
    mov r9, rdx
    xor ecx, ecx
    xor r10d, r10d
1:  cmp qword ptr [r9], 0
    jne 2f
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, r10
    jb 1b
    mov r10, rax
    add r10, [r9 + 8]
    inc qword ptr [rdi]
    inc rcx
    add rdi, 4096
    cmp rdi, rsi
    jb 1b
    mov rdi, r8
    jmp 1b
2:  mov rax, rcx
    ud2

# Writes to all pages from rdi to rsi; gives how many of them were zero before. The second word of the first
# one has the time it took, in TSC ticks.
touch:
    mov r8, rdi
    rdtsc
    shl rdx, 32
    lea r9, [rdx + rax]
    xor ecx, ecx
1:  cmp qword ptr [rdi], 0
    jne 2f
    inc ecx
2:  inc qword ptr [rdi]
    add rdi, 4096
    cmp rdi, rsi
    jb 1b
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, r9
    mov [r8 + 8], rax
    mov eax, ecx
    ud2

# Looks at words of random pages, rsi pages from rdi, until the word at rdx is not 0, and keeps a record of it:
# every so many TSC ticks, as the word at rdx + 8 says, the time and the number of looks so far go to
# the address at rdx + 16, which goes on by 16 up to the one at rdx + 24. Gives the number of looks.
look:
    mov r8, rdx
    mov r9, [rdx + 16]
    mov r11, rsi
    xor ecx, ecx
    xor r10d, r10d
1:  cmp qword ptr [r8], 0
    jne 2f
    imul rsi, rsi, 0x41c64e6d
    add rsi, 12345
    mov rax, rsi
    shr rax, 32
    imul rax, r11
    shr rax, 32
    shl rax, 12
    mov rax, [rdi + rax]
    inc rcx
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, r10
    jb 1b
    mov r10, rax
    add r10, [r8 + 8]
    cmp r9, [r8 + 24]
    jae 1b
    mov [r9], rax
    mov [r9 + 8], rcx
    add r9, 16
    mov [r8 + 16], r9
    jmp 1b
2:  mov rax, rcx
    ud2

# A disk's load: writes blocks of 4 KiB, the first of each 64 KiB, all the time, and keeps in memory what each must
# have. At rdi are the words of writer.rs:
#   0 not 0: end   8 what to do: 0 write, 1 look at all blocks, 2 take all blocks as they are
#   16 structures of virtio.rs   24 registers of the device   32 a word for each block   40 how many blocks
#   48 the highest number so far   56 steps   64 random state   72 block and 80 number that were wrong
# A block with number N has words N, N + C, N + 2C, ...; that with number 0 has zeroes. A step reads a random block,
# which must have its number, and writes the next one to it, or zeroes; now and then it flushes. Gives 0, or 1 where a
# block is not as it must be, or 2 after an error of the disk.
disk_load:
    mov rbx, rdi
    mov rsi, [rbx + 16]
    mov r8, [rbx + 24]
    xor r12d, r12d
1:  cmp qword ptr [rbx], 0
    jne 7f
    cmp qword ptr [rbx + 8], 0
    jne 2f
    call random_block
    jmp 3f
2:  cmp r12, [rbx + 40]
    jae 7f
3:  mov rax, r12
    shl rax, 7                          # sectors from one block to the next
    mov [rsi + 0x3008], rax
    xor ecx, ecx
    call disk_request
    jne 9f
    mov r14, [rsi + 0x4000]
    mov rcx, [rbx + 32]
    cmp qword ptr [rbx + 8], 2
    je 4f
    mov r14, [rcx + r12 * 8]
4:  mov rax, r14
    call is_block
    jne 8f
    inc qword ptr [rbx + 56]
    cmp qword ptr [rbx + 8], 0
    je 6f
    mov rcx, [rbx + 32]
    mov [rcx + r12 * 8], r14
    cmp r14, [rbx + 48]
    jbe 5f
    mov [rbx + 48], r14
5:  inc r12
    jmp 1b
6:  call change_block
    jne 9f
    jmp 1b
7:  xor eax, eax
    ud2
8:  mov [rbx + 72], r12
    mov rax, [rsi + 0x4000]
    mov [rbx + 80], rax
    mov eax, 1
    ud2
9:  mov [rbx + 72], r12
    mov eax, 2
    ud2

# The next block in r12, and random bits in rbp.
random_block:
    movabs rax, 6364136223846793005
    imul rax, [rbx + 64]
    movabs rcx, 1442695040888963407
    add rax, rcx
    mov [rbx + 64], rax
    mov rbp, rax
    shr rbp, 25
    and ebp, 15
    shr rax, 33
    xor edx, edx
    div qword ptr [rbx + 40]
    mov r12, rdx
    ret

# Writes the next number to block r12, or zeroes where rbp is 0; flushes where it is 1. Equal if it went well.
change_block:
    test ebp, ebp
    jz 1f
    inc qword ptr [rbx + 48]
    mov rax, [rbx + 48]
    call make_block
    mov dword ptr [rsi + 0x3100], 1     # VIRTIO_BLK_T_OUT
    mov rax, r12
    shl rax, 7
    mov [rsi + 0x3108], rax
    mov dword ptr [rsi + 0x48], 4096    # the length in descriptor 4
    mov r14, [rbx + 48]
    jmp 2f
1:  mov rax, r12
    shl rax, 7
    mov [rsi + 0x4000], rax
    mov dword ptr [rsi + 0x4008], 8
    mov dword ptr [rsi + 0x400c], 1     # unmap
    mov dword ptr [rsi + 0x3100], 13    # VIRTIO_BLK_T_WRITE_ZEROES
    mov qword ptr [rsi + 0x3108], 0
    mov dword ptr [rsi + 0x48], 16
    xor r14d, r14d
2:  mov ecx, 3
    call disk_request
    jne 3f
    mov rcx, [rbx + 32]
    mov [rcx + r12 * 8], r14
    cmp ebp, 1
    je 4f
    cmp eax, eax
3:  ret
4:  mov dword ptr [rsi + 0x3100], 4     # VIRTIO_BLK_T_FLUSH
    mov qword ptr [rsi + 0x3108], 0
    mov word ptr [rsi + 0x3e], 5        # no data: from descriptor 3 to 5
    mov ecx, 3
    call disk_request
    mov word ptr [rsi + 0x3e], 4
    ret

# The data of number rax; or equal if it is there already.
make_block:
    call block_step
1:  mov [rdi], rax
    add rax, rcx
    add rdi, 8
    cmp rdi, rdx
    jb 1b
    ret
is_block:
    call block_step
1:  cmp [rdi], rax
    jne 2f
    add rax, rcx
    add rdi, 8
    cmp rdi, rdx
    jb 1b
    cmp eax, eax
2:  ret
block_step:
    xor ecx, ecx
    test rax, rax
    jz 1f
    movabs rcx, 0x9e3779b97f4a7c15
1:  lea rdi, [rsi + 0x4000]
    lea rdx, [rsi + 0x5000]
    ret

# ---- Exceptions and interrupts --------------------------------------------------------------

# One stub of 16 bytes for each vector.
    .p2align 4
stubs:
    .set vector, 0
    .rept 80
    .p2align 4
    .if (vector != 8) && ((vector < 10) || (vector > 14)) && (vector != 17) && (vector != 21)
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
    .endr

# On the stack: vector, error code, rip, cs, rflags, rsp, ss.
exception:
    cld
    cmp qword ptr [rsp], 32
    jae interrupt
    cmp qword ptr [rsp], 6
    jne fault
    test byte ptr [rsp + 24], 3
    jz fault
    add rsp, 56
    jmp user_done

fault:
    pop rdx
    mov rcx, [rsp + 8]
    call apic_id
    test eax, eax
    jnz fault_elsewhere
    inc edx
    mov rax, rcx
    call answer
    jmp monitor
fault_elsewhere:
    shl eax, 6
    add edx, 0x100
    mov [rax + {MAILBOXES} + 48], rcx
    mov [rax + {MAILBOXES} + 40], rdx
1:  cli
    hlt
    jmp 1b

interrupt:
    cmp qword ptr [rsp], {DUMP_VECTOR}
    je dump
    push rax
    push rcx
    mov rax, [rsp + 16]
    lock inc qword ptr [rax * 8 + {COUNTERS}]
    call end_of_interrupt
    pop rcx
    pop rax
    add rsp, 16
    iretq

end_of_interrupt:
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    ret

# Leaves all registers at DUMP, in the order of SET, and goes back to the monitor.
dump:
    mov [{DUMP}], rax
    mov [{DUMP} + 0x08], rcx
    mov [{DUMP} + 0x10], rdx
    mov [{DUMP} + 0x18], rbx
    mov [{DUMP} + 0x20], rbp
    mov [{DUMP} + 0x28], rsi
    mov [{DUMP} + 0x30], rdi
    mov [{DUMP} + 0x38], r8
    mov [{DUMP} + 0x40], r9
    mov [{DUMP} + 0x48], r10
    mov [{DUMP} + 0x50], r11
    mov [{DUMP} + 0x58], r12
    mov [{DUMP} + 0x60], r13
    mov [{DUMP} + 0x68], r14
    mov [{DUMP} + 0x70], r15
    mov rax, [rsp + 32]                 # rflags
    mov [{DUMP} + 0x78], rax
    mov rax, [rsp + 40]                 # rsp
    mov [{DUMP} + 0x80], rax
    mov rax, [rsp + 24]                 # cs
    mov [{DUMP} + 0x88], rax
    mov eax, {DUMP}
    fxsave64 [rax + 0x200]
    call end_of_interrupt
    mov edx, 0x3f8                      # the byte that made the interrupt
    in al, dx
    inc edx
    xor eax, eax
    out dx, al
    xor edx, edx
    call answer
    jmp monitor

# ---- The other vCPUs ------------------------------------------------------------------------

# Copied to a page below 1 MiB, where a start-up IPI enters it in real mode.
    .code16
trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x0f, 0x01, 0x16              # lgdt [trampoline_gdt]
    .word trampoline_gdt - trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # jmp 0x18:to_long_mode
    .long {BASE} + to_long_mode - header
    .word 0x18
    .p2align 2
trampoline_gdt:
    .word {GDT_LIMIT}
    .long {GDT}
trampoline_end:
    .code64

    .p2align 3
gdt_pointer:
    .word {GDT_LIMIT}
    .quad {GDT}
    .p2align 3
idt_pointer:
    .word {IDT_LIMIT}
    .quad {IDT}

    .globl tardigrade_guest_end
tardigrade_guest_end:
    .popsection
