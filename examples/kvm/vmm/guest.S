# The guest: a real-mode program that counts, and fills its memory so that every byte of it follows from the counter.
# Assembled into the VMM as data (.rodata); the VMM copies it to CODE and starts it there.
#
#   ebx  counter, one a tick          ebp  this tick's pattern: counter * STEP
#   edi  where the sweep is           esi  a random number that follows from the counter
#
# Each tick: look whether the page under the sweep still holds what an earlier sweep left there, fill it with this
# tick's pattern, write the counter into one more page that is chosen at random, store the counter, put it out.
# DS and ES reach all memory (base 0, limit 4 GiB); there is no stack and no interrupt.

        .set    STEP, 0x9e3779b1
        .set    PAGES, 0x2000           # parameters that the VMM sets: how many pages the sweep goes over,
        .set    START, 0x2004           # where it begins,
        .set    END, 0x2008             # where it ends,
        .set    SPAN, 0x200c            # PAGES * STEP: by how much the pattern has grown since the last sweep
        .set    COUNTER, 0x2010
        .set    COUNT_PORT, 0x10
        .set    WRONG_PORT, 0x14

        .section .rodata
        .balign 16
        .globl  kvm_guest, kvm_guest_end
        .globl  kvm_guest_fill, kvm_guest_scribble, kvm_guest_store, kvm_guest_out, kvm_guest_wrong
        .hidden kvm_guest, kvm_guest_end
        .hidden kvm_guest_fill, kvm_guest_scribble, kvm_guest_store, kvm_guest_out, kvm_guest_wrong
        .code16
kvm_guest:
        incl    %ebx
        addl    $STEP, %ebp
        xorl    %eax, %eax              # before the first sweep is over: zeros
        cmpl    PAGES, %ebx
        jbe     1f
        movl    %ebp, %eax
        subl    SPAN, %eax
1:      cmpl    %eax, (%edi)
        jne     kvm_guest_wrong
        movl    %ebp, %eax
        movl    $1024, %ecx
kvm_guest_fill:
        addr32 rep stosl
        cmpl    END, %edi
        jb      2f
        movl    START, %edi
2:      imull   $1664525, %esi, %esi
        addl    $1013904223, %esi
        movl    %esi, %eax
        shrl    $8, %eax
        xorl    %edx, %edx
        divl    PAGES
        shll    $12, %edx
        addl    START, %edx
        movl    %ebx, %eax              # never the first word of a page: that is what the sweep looks at
        andl    $1023, %eax
        orl     $1, %eax
kvm_guest_scribble:
        movl    %ebx, (%edx,%eax,4)
kvm_guest_store:
        movl    %ebx, COUNTER
        movl    %ebx, %eax
        movw    $COUNT_PORT, %dx
kvm_guest_out:
        outl    %eax, %dx
        jmp     kvm_guest
kvm_guest_wrong:
        movl    %edi, %eax
        movw    $WRONG_PORT, %dx
        outl    %eax, %dx
        hlt
        jmp     kvm_guest_wrong
kvm_guest_end:
        .section .note.GNU-stack,"",@progbits
